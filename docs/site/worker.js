// Browsers start no worker from a page that lies in a folder, and the search is one: run its script in a frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.body.appendChild(document.createElement("iframe"));
      this.frame.hidden = true;
      const inside = this.frame.contentWindow;
      inside.postMessage = (data) => this.deliver(this, data);
      this.loaded = new Promise((done) => {
        const script = inside.document.body.appendChild(inside.document.createElement("script"));
        script.onload = done;
        script.src = new URL(url, location).href;
      });
    }
    deliver(target, data) {
      const event = new MessageEvent("message", { data: structuredClone(data) });
      target.dispatchEvent(event);
      if (target === this) this.onmessage?.(event); // a window calls its own
    }
    postMessage(data) {
      this.loaded.then(() => this.deliver(this.frame.contentWindow, data));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
