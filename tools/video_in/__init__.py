"""What tools/make_shards.py is made of, no programs: clips.py finds videos and captions, video.py reads pixels."""
