// Segments as a Media Source Extensions video. Media time is in seconds since the session began;
// only a little of what was shown is kept.

const KEEP_S = 10;
// Two chunks ahead is calm; one that comes late must not keep the first from being seen.
const START_S = 1;
const START_ANYWAY_MS = 1500;
const EDGE_S = 0.05;
const FASTER_FROM_S = 4;
const FASTER = 1.08;
const DEFAULT_MIME = 'video/mp4; codecs="avc1.640028"';

const Source = () => window.MediaSource ?? window.ManagedMediaSource;

export function canPlayVideo(mime = DEFAULT_MIME) {
  return Boolean(Source()?.isTypeSupported(mime));
}

export class VideoScreen {
  #video;
  #source;
  #buffer = null;
  #queue = [];
  #frames = 0;
  #closed = false;
  #fail;
  #began = false;
  #paused = false;
  #threshold = START_S;
  #listening = new AbortController();

  /** `fail(text)` is called once when this browser cannot go on playing. */
  constructor(video, { mime }, { fail, stall }) {
    this.#video = video;
    this.#fail = fail;
    this.#source = new (Source())();
    const once = { once: true, signal: this.#listening.signal };
    const each = { signal: this.#listening.signal };
    this.#source.addEventListener("sourceopen", () => this.#open(mime), once);
    video.addEventListener("error", () => this.#broken(video.error?.message), once);
    video.addEventListener("waiting", () => this.#began && stall(), each);
    video.src = URL.createObjectURL(this.#source);
    video.hidden = false;
    this.#countFrames();
  }

  get position() {
    return this.#video.currentTime;
  }

  get frames() {
    return this.#frames;
  }

  get buffered() {
    const ranges = this.#video.buffered;
    const end = ranges.length ? ranges.end(ranges.length - 1) : 0;
    return Math.max(0, end - this.#video.currentTime);
  }

  push(metadata, bytes) {
    if (!this.#began) setTimeout(() => this.#startAnyway(), START_ANYWAY_MS);
    this.#queue.push(bytes);
    this.#pump();
  }

  play() {
    this.#paused = false;
    this.#began = false;
    this.#advance();
  }

  pause() {
    this.#paused = true;
    this.#video.pause();
  }

  close() {
    this.#closed = true;
    this.#listening.abort();
    this.#video.pause();
    URL.revokeObjectURL(this.#video.src);
    this.#video.removeAttribute("src");
    this.#video.load();
    this.#video.hidden = true;
  }

  #open(mime) {
    this.#buffer = this.#source.addSourceBuffer(mime);
    this.#buffer.addEventListener("updateend", () => this.#updated(), {
      signal: this.#listening.signal,
    });
    this.#pump();
  }

  #updated() {
    if (this.#closed) return;
    this.#advance();
    this.#pump();
  }

  #pump() {
    if (this.#closed || !this.#buffer || this.#buffer.updating) return;
    if (this.#forget()) return;
    if (this.#queue.length === 0) return;
    try {
      this.#buffer.appendBuffer(this.#queue[0]);
      this.#queue.shift();
    } catch (error) {
      if (error.name !== "QuotaExceededError") this.#broken(error.message);
      else setTimeout(() => this.#pump(), 500);
    }
  }

  /** Remove what was shown long ago; true while the buffer is busy with that. */
  #forget() {
    const ranges = this.#buffer.buffered;
    const old = this.#video.currentTime - KEEP_S;
    if (ranges.length === 0 || ranges.start(0) > old - KEEP_S) return false;
    this.#buffer.remove(0, old);
    return true;
  }

  #advance() {
    const ranges = this.#video.buffered;
    if (ranges.length === 0) return;
    this.#enterRange(ranges);
    this.#video.playbackRate = this.buffered > FASTER_FROM_S ? FASTER : 1;
    const ready = !this.#paused && !this.#began && this.buffered >= this.#threshold;
    if (ready && this.#video.paused) this.#begin();
  }

  // The clock starts wherever the first segment lies, and steps over a hole in the time line.
  #enterRange(ranges) {
    const now = this.#video.currentTime;
    for (let i = 0; i < ranges.length; i += 1) {
      if (now + EDGE_S < ranges.end(i)) {
        if (now < ranges.start(i)) this.#video.currentTime = ranges.start(i);
        return;
      }
    }
  }

  #startAnyway() {
    if (this.#closed || this.#began) return;
    this.#threshold = EDGE_S;
    this.#advance();
  }

  async #begin() {
    this.#began = true;
    try {
      await this.#video.play();
    } catch {
      // The browser wants a touch first; the picture listens for one.
      this.#began = false;
    }
  }

  #countFrames() {
    if (!this.#video.requestVideoFrameCallback) {
      this.#pollFrames();
      return;
    }
    const count = (_, { presentedFrames }) => {
      if (this.#closed) return;
      this.#frames = presentedFrames;
      this.#video.requestVideoFrameCallback(count);
    };
    this.#video.requestVideoFrameCallback(count);
  }

  #pollFrames() {
    const timer = setInterval(() => {
      if (this.#closed) clearInterval(timer);
      this.#frames = this.#video.getVideoPlaybackQuality?.().totalVideoFrames ?? 0;
    }, 200);
  }

  #broken(why) {
    if (this.#closed) return;
    this.#fail(why || "the browser cannot decode this video");
  }
}
