// One session's segments, each index once and in order, over as many sockets as it takes.

import { onlyWatches } from "./access.js";
import { streamAddress } from "./api.js";

const BACKOFF_MS = [200, 400, 800, 1600, 3000, 5000];
const PING_MS = 4000;
const SILENCE_MS = 12000;

/*
 * `on` is told: start(message), chunk(metadata, bytes), link(kind, text), reconnected(),
 * message(message), fault(text) when the server repeats or skips, and over(error | null) at the end.
 * `exists()` rejects with an error that has a status when the session is gone for good.
 */
export class Stream {
  #id;
  #format;
  #next;
  #on;
  #exists;
  #socket = null;
  #metadata = null;
  #refusal = null;
  #failures = 0;
  #retry = 0;
  #watch = 0;
  #heard = 0;
  #stopped = false;
  #turn = 0;
  #asking = false;
  #lost = false;

  constructor({ id, format, from, on, exists }) {
    this.#id = id;
    this.#format = format;
    this.#next = from;
    this.#on = on;
    this.#exists = exists;
    this.#connect();
  }

  get next() {
    return this.#next;
  }

  get held() {
    return !this.#socket && !this.#asking && !this.#stopped && this.#retry === 0;
  }

  /** Stop reading for a while: the session is further ahead than there is room for. */
  hold() {
    this.#drop();
    this.#on.link("live", "enough buffered");
  }

  /** Go on at the next index, now. */
  release() {
    if (this.#stopped || this.#socket || this.#asking) return;
    clearTimeout(this.#retry);
    this.#connect();
  }

  stop() {
    this.#stopped = true;
    this.#drop();
  }

  async #connect() {
    this.#retry = 0;
    this.#metadata = null;
    this.#refusal = null;
    const turn = (this.#turn += 1);
    this.#asking = true;
    let address;
    try {
      address = await streamAddress(this.#id, this.#next, this.#format);
    } catch (error) {
      if (turn === this.#turn) this.#unaddressed(error);
      return;
    }
    if (turn !== this.#turn) return;
    this.#asking = false;
    const socket = new WebSocket(address);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    let opened = false;
    this.#on.link("waiting", this.#lost ? "reconnecting" : "connecting");
    socket.onopen = () => {
      opened = true;
      this.#opened();
    };
    socket.onmessage = (event) => socket === this.#socket && this.#received(event.data);
    socket.onclose = (event) => socket === this.#socket && this.#closed(event, opened);
  }

  #unaddressed(error) {
    this.#asking = false;
    if (error.status && error.status < 500 && error.status !== 429) this.#end(error);
    else this.#later("cannot connect");
  }

  #opened() {
    this.#heard = performance.now();
    this.#watch = setInterval(() => this.#checkSilence(), PING_MS);
    this.#on.link("live", "connected");
    if (this.#lost) this.#on.reconnected();
    this.#lost = false;
  }

  // A path that died without a word never closes the socket; silence tells.
  #checkSilence() {
    if (performance.now() - this.#heard > SILENCE_MS) {
      this.#drop();
      this.#later("no word from the server");
      return;
    }
    this.send({ type: "session.ping" });
  }

  send(message) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(message));
  }

  #received(data) {
    this.#heard = performance.now();
    if (typeof data === "string") this.#text(data);
    else this.#segment(data);
  }

  #text(data) {
    let message;
    try {
      message = JSON.parse(data);
    } catch {
      this.#fault("the server sent a message that is not JSON");
      return;
    }
    if (message.type === "video.chunk_metadata") this.#metadata = message;
    else if (message.type === "video.start") this.#on.start(message);
    else if (message.type === "session.done") this.#end(null);
    else if (message.type === "error") this.#refusal = message;
    else this.#on.message(message);
  }

  #segment(bytes) {
    const metadata = this.#metadata;
    this.#metadata = null;
    if (!metadata) this.#fault("the server sent a segment without its metadata");
    else if (metadata.chunk_index < this.#next) this.#fault(this.#wrong("repeated", metadata));
    else if (metadata.chunk_index > this.#next) this.#fault(this.#wrong("skipped to", metadata));
    else if (metadata.byte_length !== bytes.byteLength) this.#fault(this.#wrong("cut", metadata));
    else this.#accept(metadata, bytes);
  }

  #wrong(what, metadata) {
    return `the server ${what} chunk ${metadata.chunk_index}; chunk ${this.#next} was due`;
  }

  #accept(metadata, bytes) {
    this.#failures = 0;
    this.#next = metadata.chunk_index + 1;
    this.#on.chunk(metadata, bytes);
    this.send({ type: "session.ack", chunk_index: metadata.chunk_index });
  }

  #fault(text) {
    this.#on.fault(text);
    this.#drop();
    this.#later("asking again");
  }

  #closed(event, opened) {
    this.#drop();
    const refusal = this.#refusal ?? refusalOf(event);
    // The token in a socket's address is short-lived; whoever may make one goes on with the next.
    const renewable = refusal?.code === "token_expired" && opened && !onlyWatches();
    if (refusal && !refusal.retryable && !renewable) this.#end(refusal);
    else if (opened) this.#later("connection lost", refusal?.retry_after_s);
    else this.#check();
  }

  // A browser does not say why a socket was refused; the session's own resource does.
  async #check() {
    this.#later("cannot connect");
    try {
      await this.#exists();
    } catch (error) {
      if (error.status === 404 || error.status === 410) this.#end(error);
    }
  }

  #later(why, seconds = 0) {
    if (this.#stopped) return;
    this.#lost = true;
    const step = BACKOFF_MS[Math.min(this.#failures, BACKOFF_MS.length - 1)];
    const wait = Math.max(step * (0.75 + Math.random() / 2), (seconds ?? 0) * 1000);
    this.#failures += 1;
    this.#retry = setTimeout(() => this.#connect(), wait);
    this.#on.link("waiting", `${why}; trying again`);
  }

  #end(error) {
    if (this.#stopped) return;
    this.stop();
    this.#on.over(error);
  }

  #drop() {
    this.#turn += 1;
    this.#asking = false;
    clearInterval(this.#watch);
    clearTimeout(this.#retry);
    this.#retry = 0;
    const socket = this.#socket;
    this.#socket = null;
    socket?.close();
  }
}

function refusalOf(event) {
  const final = event.code === 1008 || event.code === 1009;
  const message = event.reason || "the server closed the stream";
  return final ? { code: "closed", message, retryable: false } : null;
}
