"""Which family calls which pipeline's network. common.Model imports this: --help need not wait for diffusers."""

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from families.wan import Wan

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

FAMILIES = {"WanPipeline": Wan}
