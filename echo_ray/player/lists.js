// The tables of sessions and replicas, renewed in place so that focus stays where it is.

import { listReplicas, listSessions } from "./api.js";

const POLL_MS = 3000;
const SESSIONS_SHOWN = 50;

/** Keep both tables fresh; `watched()` gives {session, owner}, `join(id)` is the rows' button. */
export function keepLists({ sessions, replicas }, { watched, join }) {
  const askSessions = unlessForbidden(listSessions);
  const askReplicas = unlessForbidden(listReplicas);
  const renew = async () => {
    if (document.hidden) return;
    const [some, machines] = await Promise.allSettled([askSessions(), askReplicas()]);
    const { session, owner } = watched();
    if (some.value) fillSessions(sessions, some.value, session, join);
    if (machines.value) fillReplicas(replicas, machines.value, owner);
  };
  renew();
  setInterval(renew, POLL_MS);
  return renew;
}

/** What is forbidden to this page's token is asked for once. */
function unlessForbidden(list) {
  let forbidden = false;
  return async () => {
    if (forbidden) return null;
    try {
      return await list();
    } catch (error) {
      forbidden = error.status === 401 || error.status === 403;
      throw error;
    }
  };
}

function fillSessions(body, items, current, join) {
  const latest = items.filter((s) => s.state !== "closed").slice(-SESSIONS_SHOWN).reverse();
  syncRows(body, latest, (row, item) => {
    setCells(row, [item.prompt, item.state, item.next_chunk ?? "–", null]);
    row.title = item.id;
    mark(row, item.id === current);
    joinButton(row.cells[3], item, join).disabled = item.id === current;
  });
}

function fillReplicas(body, items, owner) {
  syncRows(body, items, (row, item) => {
    const seconds = item.chunk_seconds ? `${Math.round(item.chunk_seconds * 1000)} ms` : "–";
    setCells(row, [item.id, item.state, item.sessions?.length ?? 0, seconds]);
    row.title = `node ${item.node_id}, process ${item.pid}`;
    mark(row, item.id === owner);
  });
}

function joinButton(cell, item, join) {
  if (cell.firstChild) return cell.firstChild;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Join";
  button.setAttribute("aria-label", `Join session ${item.prompt}`);
  button.addEventListener("click", () => join(item.id));
  cell.append(button);
  return button;
}

function syncRows(body, items, fill) {
  const old = new Map(Array.from(body.rows, (row) => [row.dataset.id, row]));
  const rows = items.map((item) => {
    const row = old.get(item.id) ?? document.createElement("tr");
    row.dataset.id = item.id;
    fill(row, item);
    return row;
  });
  const same = rows.length === body.rows.length && rows.every((row, i) => row === body.rows[i]);
  if (!same) body.replaceChildren(...rows);
}

function setCells(row, texts) {
  texts.forEach((text, i) => {
    const cell = row.cells[i] ?? row.insertCell();
    if (text !== null && cell.textContent !== String(text)) cell.textContent = text;
  });
}

function mark(row, on) {
  if (on) row.setAttribute("aria-current", "true");
  else row.removeAttribute("aria-current");
}
