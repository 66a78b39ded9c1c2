// One session being watched: its stream, the screen it is shown on, and what is measured of both.

import { getSession } from "./api.js";
import { CanvasScreen } from "./canvas_screen.js";
import { Stream } from "./stream.js";
import { VideoScreen } from "./video_screen.js";

const HOLD_FROM_S = 20;
const HOLD_TO_S = 8;
const RATE_WINDOW_MS = 2500;
const PTS_SLACK_S = 0.002;

/*
 * `tell` is told: link(kind, text), event(text), shown(metadata) when a chunk begins to play,
 * fault(text), unplayable(why) and over(error | null).
 */
export class Viewer {
  #stage;
  #tell;
  #stream;
  #screen = null;
  #shape = "";
  #chunks = [];
  #playing = null;
  #last = null;
  #arrived = 0;
  #samples = [];
  #handovers = 0;
  #gap = null;
  #stalls = 0;
  #reconnects = 0;

  constructor({ id, from, format, stage, tell }) {
    this.id = id;
    this.format = format;
    this.#stage = stage;
    this.#tell = tell;
    this.#watch(from);
  }

  /** First chunk that has not been shown whole. */
  get place() {
    return this.#playing?.chunk_index ?? this.#chunks[0]?.chunk_index ?? this.#stream.next;
  }

  get facts() {
    return {
      fps: this.#rate(),
      playing: this.#playing,
      received: this.#last,
      buffered: this.#screen?.buffered ?? 0,
      handovers: this.#handovers,
      gap: this.#gap,
      stalls: this.#stalls,
      reconnects: this.#reconnects,
    };
  }

  /** To be called a few times a second. */
  tick() {
    this.#follow();
    this.#sample();
    const buffered = this.#screen?.buffered ?? 0;
    if (this.#stream.held && buffered < HOLD_TO_S) this.#stream.release();
  }

  pause() {
    this.#stream.stop();
    this.#screen?.pause();
    this.#arrived = 0;
  }

  resume() {
    this.#watch(this.#stream.next);
    this.#screen?.play();
  }

  play() {
    this.#screen?.play();
  }

  close() {
    this.#stream.stop();
    this.#screen?.close();
    this.#screen = null;
  }

  #watch(from) {
    const on = {
      start: (message) => this.#show(message),
      chunk: (metadata, bytes) => this.#take(metadata, bytes),
      link: this.#tell.link,
      reconnected: () => this.#reconnected(),
      message: (message) => this.#hear(message),
      fault: this.#tell.fault,
      over: this.#tell.over,
    };
    const exists = () => getSession(this.id);
    this.#stream = new Stream({ id: this.id, format: this.format, from, on, exists });
  }

  // After a reconnect the same picture goes on where it was.
  #show(start) {
    const shape = JSON.stringify([start.format, start.width, start.height, start.fps, start.mime]);
    if (shape === this.#shape) return;
    this.#shape = shape;
    this.#screen?.close();
    const { picture, video, canvas } = this.#stage;
    picture.style.setProperty("--shape", start.width / start.height);
    picture.classList.toggle("small", start.width <= 256);
    picture.dataset.state = "live";
    const reports = { fail: this.#tell.unplayable, stall: () => (this.#stalls += 1) };
    this.#screen =
      start.format === "fmp4"
        ? new VideoScreen(video, start, reports)
        : new CanvasScreen(canvas, start, reports);
  }

  #take(metadata, bytes) {
    const now = performance.now();
    this.#noteOwner(metadata, now);
    if (metadata.discontinuity) this.#tell.event(`chunk ${metadata.chunk_index}: discontinuity`);
    this.#last = metadata;
    this.#arrived = now;
    this.#chunks.push(metadata);
    this.#screen?.push(metadata, bytes);
    if ((this.#screen?.buffered ?? 0) > HOLD_FROM_S) this.#stream.hold();
  }

  #noteOwner(metadata, now) {
    const last = this.#last;
    if (!last || (last.owner === metadata.owner && last.epoch === metadata.epoch)) return;
    if (last.owner !== metadata.owner) this.#handovers += 1;
    this.#gap = this.#arrived ? (now - this.#arrived) / 1000 : null;
    const gap = this.#gap === null ? "" : `, ${this.#gap.toFixed(2)} s between the chunks`;
    this.#tell.event(`chunk ${metadata.chunk_index}: owner is now ${metadata.owner}${gap}`);
  }

  #reconnected() {
    this.#reconnects += 1;
    this.#tell.event(`reconnected at chunk ${this.#stream.next}`);
  }

  #hear(message) {
    if (message.type === "session.migrating") this.#tell.event("another replica is catching up");
    if (message.type === "session.going_away") this.#tell.event("the owner hands the session over");
  }

  // What is shown now lies behind what has arrived by as much as is buffered.
  #follow() {
    const position = (this.#screen?.position ?? 0) + PTS_SLACK_S;
    let begun = null;
    while (this.#chunks.length > 0 && this.#chunks[0].pts_ms / 1000 <= position) {
      begun = this.#chunks.shift();
      this.#playing = begun;
      this.#tell.shown(begun);
    }
  }

  #sample() {
    const now = performance.now();
    this.#samples.push([now, this.#screen?.frames ?? 0]);
    while (now - this.#samples[0][0] > RATE_WINDOW_MS) this.#samples.shift();
  }

  #rate() {
    if (this.#samples.length < 2) return 0;
    const [from, before] = this.#samples[0];
    const [to, after] = this.#samples[this.#samples.length - 1];
    return Math.max(0, ((after - before) * 1000) / (to - from));
  }
}
