// Segments of motion JPEG, drawn on a canvas by a clock of their own. The same face as VideoScreen.

const START_S = 1;
const START_ANYWAY_MS = 1500;
const FASTER_FROM_S = 4;
const FASTER = 1.08;

export class CanvasScreen {
  #canvas;
  #context;
  #fps;
  #queue = [];
  #showing = null;
  #shown = 0;
  #frames = 0;
  #firstAt = null;
  #due = 0;
  #waiting = true;
  #paused = false;
  #closed = false;
  #position = 0;
  #stall;
  #fail;

  constructor(canvas, { fps, width, height }, { fail, stall }) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.#fps = fps;
    this.#stall = stall;
    this.#fail = fail;
    canvas.width = width;
    canvas.height = height;
    canvas.hidden = false;
    requestAnimationFrame((now) => this.#tick(now));
  }

  get position() {
    return this.#position;
  }

  get frames() {
    return this.#frames;
  }

  get buffered() {
    const left = this.#showing ? this.#showing.pictures.length - this.#shown : 0;
    return this.#queue.reduce((sum, c) => sum + c.count, left) / this.#fps;
  }

  push(metadata, bytes) {
    const chunk = { start: metadata.pts_ms / 1000, count: metadata.num_frames, pictures: null };
    this.#firstAt ??= performance.now();
    this.#queue.push(chunk);
    this.#decode(chunk, bytes);
  }

  play() {
    this.#paused = false;
    this.#waiting = true;
  }

  pause() {
    this.#paused = true;
  }

  close() {
    this.#closed = true;
    this.#canvas.hidden = true;
    for (const chunk of [this.#showing, ...this.#queue]) chunk?.pictures?.forEach((p) => p.close());
  }

  async #decode(chunk, bytes) {
    try {
      const blobs = splitJpegs(new Uint8Array(bytes)).map((b) => new Blob([b], { type: "image/jpeg" }));
      chunk.pictures = await Promise.all(blobs.map((b) => createImageBitmap(b)));
    } catch (error) {
      if (!this.#closed) this.#fail(error.message);
    }
    if (this.#closed) chunk.pictures?.forEach((p) => p.close());
  }

  #tick(now) {
    if (this.#closed) return;
    requestAnimationFrame((next) => this.#tick(next));
    if (this.#paused) return;
    if (this.#waiting) this.#restart(now);
    while (!this.#waiting && this.#due <= now) this.#step();
  }

  #restart(now) {
    const first = this.#showing ?? this.#queue[0];
    if (!first?.pictures) return;
    const early = this.buffered < START_S && now - this.#firstAt < START_ANYWAY_MS;
    if (this.#frames === 0 && early) return;
    this.#waiting = false;
    this.#due = now;
  }

  #step() {
    if (!this.#showing || this.#shown === this.#showing.pictures.length) this.#nextChunk();
    if (this.#waiting) return;
    const picture = this.#showing.pictures[this.#shown];
    this.#context.drawImage(picture, 0, 0);
    picture.close();
    this.#position = this.#showing.start + this.#shown / this.#fps;
    this.#shown += 1;
    this.#frames += 1;
    this.#due += 1000 / this.#fps / (this.buffered > FASTER_FROM_S ? FASTER : 1);
  }

  #nextChunk() {
    this.#showing = null;
    this.#shown = 0;
    if (!this.#queue[0]?.pictures) {
      this.#waiting = true;
      this.#stall();
      return;
    }
    this.#showing = this.#queue.shift();
  }
}

/** The JPEG files of a motion JPEG segment. Headers are skipped by their lengths. */
export function splitJpegs(data) {
  const files = [];
  for (let start = 0; start < data.length; ) {
    const end = jpegEnd(data, start);
    files.push(data.subarray(start, end));
    start = end;
  }
  return files;
}

function jpegEnd(data, start) {
  if (data[start] !== 0xff || data[start + 1] !== 0xd8) throw new Error("not a JPEG segment");
  let at = start + 2;
  while (at + 4 <= data.length && data[at] === 0xff) {
    const marker = data[at + 1];
    at += 2 + data[at + 2] * 256 + data[at + 3];
    if (marker === 0xda) return imageEnd(data, at);
  }
  throw new Error("a JPEG of the segment is cut short");
}

function imageEnd(data, at) {
  for (let i = at; i + 1 < data.length; i += 1) {
    if (data[i] === 0xff && data[i + 1] === 0xd9) return i + 2;
  }
  throw new Error("a JPEG of the segment is cut short");
}
