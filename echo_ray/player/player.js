// The page: forms and buttons on one side, one Viewer at a time on the other.

import { onlyWatches } from "./access.js";
import * as api from "./api.js";
import { keepLists } from "./lists.js";
import { canPlayVideo } from "./video_screen.js";
import { Viewer } from "./viewer.js";

const TICK_MS = 250;
const EVENTS_SHOWN = 8;
const NO_LONGER_KEPT = ["segment_expired", "viewer_too_slow"];

const element = (id) => document.getElementById(id);
const stage = { picture: element("picture"), video: element("video"), canvas: element("canvas") };
const state = { viewer: null, over: false, pending: null, paused: false };
let renewLists = () => {};

function setText(id, text) {
  const node = element(id);
  if (node.textContent !== String(text)) node.textContent = text;
}

function setLink(kind, text) {
  element("link").dataset.kind = kind;
  setText("link", text);
}

function showAlert(text) {
  element("alert").hidden = !text;
  setText("alert", text ?? "");
}

function showError(error) {
  const unreachable = error instanceof TypeError;
  const code = error.code ? ` (${error.code})` : "";
  showAlert(unreachable ? "The service cannot be reached." : `${error.message}${code}`);
}

function showEvent(text) {
  const line = document.createElement("li");
  line.textContent = text;
  const list = element("events");
  list.prepend(line);
  while (list.children.length > EVENTS_SHOWN) list.lastChild.remove();
}

function showHint(text) {
  element("hint").hidden = !text;
  setText("hint", text ?? "");
}

function renderButtons() {
  const on = state.viewer !== null && !state.over && !onlyWatches();
  element("pause").disabled = !on || state.paused;
  element("resume").disabled = !on || !state.paused;
  element("close").disabled = !on;
  for (const control of element("switch-form").elements) control.disabled = !on;
}

function renderFacts() {
  const { viewer } = state;
  if (!viewer) return;
  viewer.tick();
  const facts = viewer.facts;
  const chunk = facts.playing ?? facts.received;
  setText("fps", facts.fps.toFixed(1));
  setText("chunk", facts.playing?.chunk_index ?? "–");
  setText("received", facts.received?.chunk_index ?? "–");
  setText("buffered", `${facts.buffered.toFixed(1)} s`);
  setText("stalls", facts.stalls);
  setText("handovers", facts.handovers);
  setText("gap", facts.gap === null ? "–" : `${facts.gap.toFixed(2)} s`);
  setText("reconnects", facts.reconnects);
  setText("epoch", facts.received?.epoch ?? "–");
  setText("owner", facts.received?.owner ?? "–");
  if (chunk) renderDrift(chunk.drift);
}

function renderDrift(drift) {
  const node = element("drift");
  const flags = drift?.flags ?? [];
  const text = drift ? drift.score.toFixed(2) : "–";
  if (node.dataset.shown === text + flags) return;
  node.dataset.shown = text + flags;
  node.textContent = text;
  for (const flag of flags) {
    const mark = document.createElement("span");
    mark.className = "flag";
    mark.textContent = flag.replace("_", " ");
    node.append(mark);
  }
}

function showPrompt(prompt, ignored = []) {
  setText("effect", prompt);
  setText("ignored", ignored.length > 0 ? `not understood: ${ignored.join(", ")}` : "");
}

function chunkShown(metadata) {
  showHint("");
  if (metadata.prompt) showPrompt(metadata.prompt, metadata.ignored_words);
  const started = metadata.started_event_ids ?? [];
  if (started.length === 0) return;
  showEvent(`chunk ${metadata.chunk_index}: ${metadata.prompt}`);
  if (!started.includes(state.pending)) return;
  state.pending = null;
  setText("switch-note", `In effect since chunk ${metadata.chunk_index}.`);
}

function watch(id, from, format) {
  state.viewer?.close();
  state.over = false;
  state.paused = false;
  // A viewer that was closed may still have words on the way; only the present one is heard.
  const heard = (act) => (...words) => viewer === state.viewer && act(...words);
  const tell = {
    link: setLink,
    event: heard(showEvent),
    shown: heard(chunkShown),
    fault: heard((text) => showAlert(`Stream error: ${text}.`)),
    unplayable: heard((why) => takeFormat("jpeg", why)),
    over: heard(ended),
  };
  const viewer = new Viewer({ id, from, format, stage, tell });
  state.viewer = viewer;
  renderButtons();
}

function openSession(session, from) {
  showAlert(null);
  showHint("Waiting for the first picture…");
  element("events").replaceChildren();
  setText("switch-note", "");
  showPrompt(session.prompt ?? "–");
  setText("session", session.id);
  state.pending = null;
  const url = new URL(location.href);
  url.searchParams.set("session", session.id);
  history.replaceState(null, "", url);
  watch(session.id, from, element("format").value);
  renewLists();
}

function takeFormat(format, why) {
  element("format").value = format;
  if (why) showEvent(`shown as JPEG, since the video failed: ${why}`);
  const { viewer } = state;
  if (viewer && !state.over) watch(viewer.id, viewer.place, format);
}

function ended(error) {
  if (error && NO_LONGER_KEPT.includes(error.code)) {
    goOnNow();
    return;
  }
  state.viewer?.pause();
  state.over = true;
  setLink(error ? "failed" : "idle", error ? "stream ended" : "session closed");
  if (error) showError(error);
  renderButtons();
  renewLists();
}

async function goOnNow() {
  const { viewer } = state;
  try {
    const session = await api.getSession(viewer.id);
    const missed = `${viewer.facts.received?.chunk_index + 1 || 0} to ${session.next_chunk - 1}`;
    showAlert(`Chunks ${missed} are no longer kept; going on at ${session.next_chunk}.`);
    watch(viewer.id, session.next_chunk, viewer.format);
  } catch (error) {
    ended(error);
  }
}

async function startSession(event) {
  event.preventDefault();
  const wish = { prompt: element("prompt").value };
  const seed = element("seed").value;
  if (seed !== "") wish.seed = Number(seed);
  await attempt(async () => openSession(await api.createSession(wish, element("clip").files[0]), 0));
}

async function joinSession(id) {
  await attempt(async () => {
    const session = await api.getSession(id);
    openSession(session, session.next_chunk ?? 0);
  });
}

async function sendSwitch(event) {
  event.preventDefault();
  const field = element("switch");
  const eventId = api.freshId();
  await attempt(async () => {
    const answer = await api.switchPrompt(state.viewer.id, eventId, field.value);
    state.pending = eventId;
    setText("switch-note", `Takes effect at chunk ${answer.effective_chunk}.`);
    field.value = "";
  });
}

async function pause() {
  const { viewer } = state;
  // Watching would resume it, so the stream ends first.
  viewer.pause();
  state.paused = true;
  renderButtons();
  setLink("idle", "paused");
  await attempt(() => api.pauseSession(viewer.id));
}

async function resume() {
  const { viewer } = state;
  await attempt(async () => {
    await api.resumeSession(viewer.id);
    state.paused = false;
    viewer.resume();
  });
  renderButtons();
}

async function close() {
  const { viewer } = state;
  await attempt(async () => {
    await api.closeSession(viewer.id);
    if (viewer === state.viewer) ended(null);
  });
}

async function attempt(act) {
  showAlert(null);
  try {
    await act();
  } catch (error) {
    showError(error);
  }
}

function chooseFirstFormat() {
  if (canPlayVideo()) return;
  element("format").options[0].disabled = true;
  element("format").value = "jpeg";
}

function begin() {
  chooseFirstFormat();
  element("start-form").addEventListener("submit", startSession);
  element("switch-form").addEventListener("submit", sendSwitch);
  element("pause").addEventListener("click", pause);
  element("resume").addEventListener("click", resume);
  element("close").addEventListener("click", close);
  element("format").addEventListener("change", (event) => takeFormat(event.target.value));
  stage.picture.addEventListener("click", () => !state.paused && !state.over && state.viewer?.play());
  setInterval(renderFacts, TICK_MS);
  const watched = () => ({
    session: state.over ? null : state.viewer?.id,
    owner: state.viewer?.facts.received?.owner,
  });
  if (onlyWatches()) {
    // Whoever has leave to watch one session starts none, changes none and sees no others.
    for (const id of ["start-form", "switch-form", "lists"]) element(id).hidden = true;
    element("hint").textContent = "This link is for watching one session.";
  } else {
    renewLists = keepLists(
      { sessions: element("sessions"), replicas: element("replicas") },
      { watched, join: joinSession },
    );
  }
  const asked = new URL(location.href).searchParams.get("session");
  if (asked) joinSession(asked);
}

begin();
