// A box to ask the model, where the page is served by vLLM's own port: before and after training.
import { ask, root, sentence } from "./api.js";
import { $, el, figure, number, show, text } from "./dom.js";
import { latency } from "./series.js";
import { state } from "./state.js";

const asked = new Map(); // question -> its list of answers
let onServer = null;

/** vLLM's /health is empty; the coordinator's is JSON. */
export async function find() {
  if (onServer !== null) return;
  const answer = await fetch(new URL("health", root), { cache: "no-store" });
  onServer = answer.ok && (await answer.text()).trim() === "";
  show($("ask"), onServer);
}

/** Where to go instead, on the coordinator's port. */
export function drawAsk() {
  show($("askelsewhere"), onServer === false);
  const url = latency.url ? new URL("train/page/", `${latency.url.replace(/\/$/, "")}/`) : null;
  if (url && ["127.0.0.1", "localhost", "[::1]"].includes(url.hostname)) url.hostname = location.hostname;
  if (onServer !== false || $("askelsewhere").dataset.url === String(url)) return;
  $("askelsewhere").dataset.url = url;
  const link = url && ["http:", "https:"].includes(url.protocol) ? el("a", { href: url.href }, url.href) : "/train/page/ on the server's address";
  $("askelsewhere").replaceChildren("The model answers on the server's own port. Open this page there to ask it: ", link);
}

async function send(question) {
  const started = performance.now(), version = state.status?.trainer.weight_version;
  const model = state.status?.trainer.served_model_names?.[0];
  const body = { model, messages: [{ role: "user", content: question }], max_tokens: Number($("asktokens").value), temperature: 0 };
  show($("askproblem"), false);
  try {
    const options = { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
    const choice = (await ask("v1/chat/completions", options)).body.choices[0];
    add(question, version, choice, (performance.now() - started) / 1000);
  } catch (error) {
    text($("askproblem"), error.status === 401 ? "The server asks for an API key, which this page does not have." : sentence(error));
    show($("askproblem"), true);
  }
}

function add(question, version, choice, seconds) {
  let list = asked.get(question);
  if (!list) {
    list = el("dl");
    asked.set(question, list);
    const again = el("button", { type: "button", "aria-label": `Ask again: ${question}`, onclick: () => send(question) }, "Ask again");
    $("answers").prepend(el("div", { class: "qa" }, el("div", { class: "head" }, el("b", {}, question), again), list));
  }
  const cut = choice.finish_reason === "length" ? " …" : "";
  list.prepend(el("div", {}, el("dt", {}, `weight version ${number(version)}, ${figure(seconds, 2)} s`), el("dd", {}, (choice.message.content || "") + cut)));
}

export function setUp() {
  $("ask").addEventListener("submit", event => {
    event.preventDefault();
    const question = $("question").value.trim();
    if (question) send(question);
  });
}
