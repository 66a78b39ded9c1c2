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

export function streamAddress(id, from, format) {
  const url = addressOf(`v1/sessions/${encodeURIComponent(id)}/stream`);
  url.protocol = url.protocol.replace("http", "ws");
  url.search = new URLSearchParams({ from, format });
  return url;
}

async function call(method, path, body) {
  const response = await fetch(addressOf(path), {
    method,
    headers: body ? { "content-type": "application/json" } : {},
    body: body ? JSON.stringify(body) : undefined,
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

export const createSession = (wish) => call("POST", "v1/sessions", wish);
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
