import { credentials, socketToken } from "./access.js";

// The service's HTTP resources, as promises. A refusal is an ApiError with the service's own words.

export class ApiError extends Error {
  constructor(status, body) {
    const error = body?.error ?? {};
    super(error.message ?? `the service answered ${status}`);
    this.status = status;
    this.code = error.code ?? `http_${status}`;
  }
}

export function addressOf(path) {
  return new URL(path, document.baseURI);
}

export async function streamAddress(id, from, format) {
  const url = addressOf(sessionPath(id, "/stream"));
  url.protocol = url.protocol.replace("http", "ws");
  url.search = new URLSearchParams({ from, format });
  // A browser cannot set headers on a socket.
  const token = await socketToken(() => call("POST", sessionPath(id, "/viewer-tokens"), {}));
  if (token) url.searchParams.set("token", token);
  return url;
}

async function call(method, path, body) {
  const form = body instanceof FormData;
  const response = await fetch(addressOf(path), {
    method,
    // A form says its type itself, with the boundary between its parts.
    headers: { ...credentials(), ...(body && !form && { "content-type": "application/json" }) },
    body: body && !form ? JSON.stringify(body) : body,
  });
  const text = await response.text();
  const answer = text ? readJson(text) : {};
  if (!response.ok) throw new ApiError(response.status, answer);
  return answer;
}

function readJson(text) {
  try {
    return JSON.parse(text);
  } catch {
    return {};
  }
}

function sessionPath(id, verb = "") {
  return `v1/sessions/${encodeURIComponent(id)}${verb}`;
}

// The clip is a File, or undefined.
export function createSession(wish, clip) {
  if (!clip) return call("POST", "v1/sessions", wish);
  const form = new FormData();
  form.append("session", JSON.stringify(wish));
  form.append("clip", clip);
  return call("POST", "v1/sessions", form);
}

export const getSession = (id) => call("GET", sessionPath(id));
export const closeSession = (id) => call("DELETE", sessionPath(id));
export const pauseSession = (id) => call("POST", sessionPath(id, "/pause"));
export const resumeSession = (id) => call("POST", sessionPath(id, "/resume"));

export async function listSessions() {
  return (await call("GET", "v1/sessions")).sessions ?? [];
}

export async function listReplicas() {
  return (await call("GET", "v1/admin/replicas")).replicas ?? [];
}

// The event id makes it safe to ask again when the answer was lost on the way.
export async function switchPrompt(id, eventId, prompt, tries = 3) {
  const body = { event_id: eventId, event: { prompt } };
  for (;;) {
    try {
      return await call("POST", sessionPath(id, "/events"), body);
    } catch (error) {
      tries -= 1;
      if (error instanceof ApiError || tries === 0) throw error;
      await new Promise((resolve) => setTimeout(resolve, 500));
    }
  }
}

export function freshId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
}
