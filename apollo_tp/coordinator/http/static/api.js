// Requests to the coordinator, by paths relative to where the page is served: its own port, vLLM's, or behind a proxy.
export const root = new URL("../../", import.meta.url);

root.username = root.password = ""; // fetch refuses URLs with them

export class Refusal extends Error {
  constructor(status, error) {
    super(error.message || `got status ${status}`);
    this.status = status;
    this.code = error.code;
  }
}

export class Unreachable extends Error {}

export async function ask(path, options = {}) {
  const answer = await fetch(new URL(path, root), { cache: "no-store", ...options }).catch(error => { throw new Unreachable(error.message); });
  if (answer.status === 304) return { body: null, answer };
  const text = await answer.text();
  let body = null;
  try { body = JSON.parse(text); } catch { /* a proxy's page, for example */ }
  if (!answer.ok) throw new Refusal(answer.status, body?.error || { message: text.slice(0, 300) });
  return { body, answer };
}

export const get = async path => (await ask(path)).body;

export async function post(path, body) {
  const options = { method: "POST", body: JSON.stringify(body ?? {}), headers: { "Content-Type": "application/json" } };
  return (await ask(path, options)).body;
}

/** What went wrong, as a sentence for people. */
export function sentence(error) {
  if (!(error instanceof Unreachable || error instanceof Refusal)) return `This page failed: ${error.message}. Please report it with what the browser's console says.`;
  if (error instanceof Unreachable) return `The coordinator does not answer (${error.message}). The page tries again every second.`;
  if (error.code === "scope") return "The token that you gave may only read. Actions need a token of scope train: close the browser, open the page again and give that one.";
  if (error.status === 401) return "The trainer asks for a token. Reload the page and give the token as password, with any user name.";
  const text = error.message;
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}
