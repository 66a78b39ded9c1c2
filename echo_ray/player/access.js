// The token of a service with access on: from the address, then out of it, so that it does not leak.

const KEY = "echo-ray-token";
const VIEWER = "echo-view.";

function fromAddress() {
  const url = new URL(location.href);
  const fragment = new URLSearchParams(url.hash.slice(1));
  const token = fragment.get("token") ?? url.searchParams.get("token");
  if (!token) return null;
  fragment.delete("token");
  url.searchParams.delete("token");
  url.hash = fragment.toString();
  history.replaceState(null, "", url);
  return token;
}

// Only this tab keeps it, so that the page can be loaded again.
let token = fromAddress() ?? sessionStorage.getItem(KEY);
if (token) sessionStorage.setItem(KEY, token);

export const onlyWatches = () => token?.startsWith(VIEWER) ?? false;

export function credentials() {
  return token ? { authorization: `Bearer ${token}` } : {};
}

/** What a socket's address needs; `mint()` gets a viewer token for a token that may not stand there. */
export async function socketToken(mint) {
  if (!token || onlyWatches()) return token;
  return (await mint()).token;
}
