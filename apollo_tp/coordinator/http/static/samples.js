// Samples as tokens, with those that are learned marked; and the dry run, which shows them before anything is trained.
import { post, sentence } from "./api.js";
import { $, el, number, text } from "./dom.js";
import { many } from "./state.js";

const MAX_TOKENS = 4000;
const EXAMPLE = { messages: [{ role: "user", content: "Who are you?" }, { role: "assistant", content: "I am Apollo." }] };

/** The tokens of a sample; learned ones in <mark>, each with its id and weight as title. */
export function tokensOf(sample) {
  const box = el("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": `${sample.side || "sample"}: tokens, learned ones are marked` });
  if (sample.side) box.append(el("b", {}, `${sample.side}: `));
  let run = null, learned = null;
  for (let i = 0; i < Math.min(sample.token_ids.length, MAX_TOKENS); i++) {
    const weight = sample.weights[i], id = sample.token_ids[i], token = sample.tokens ? sample.tokens[i] : `${id} `;
    if (weight > 0 !== learned) box.append(run = el((learned = weight > 0) ? "mark" : "span"));
    run.append(el("span", { title: `token ${id}, weight ${weight}` }, token.replaceAll("\n", "⏎\n")));
  }
  if (sample.token_ids.length > MAX_TOKENS) box.append(` … and ${number(sample.token_ids.length - MAX_TOKENS)} more tokens`);
  return box;
}

function parse(written) {
  try {
    const value = JSON.parse(written);
    return Array.isArray(value) ? value : value.samples || [value];
  } catch (error) {
    const lines = written.split("\n").filter(line => line.trim());
    if (lines.length < 2) throw error;
    return lines.map(line => JSON.parse(line));
  }
}

export function setUp() {
  $("trysamples").value = JSON.stringify(EXAMPLE);
  $("try").addEventListener("submit", async event => {
    event.preventDefault();
    $("tried").replaceChildren();
    text($("trynote"), "");
    let samples;
    try { samples = parse($("trysamples").value); } catch (error) { text($("trynote"), `This is not JSON: ${error.message}.`); return; }
    try {
      const answer = await post("train?dry_run=true", { samples });
      text($("trynote"), `${many(answer.num_tokens, "token")}, ${number(answer.num_loss_tokens)} of them learned (marked)`);
      $("tried").append(...answer.samples.map(tokensOf));
    } catch (error) { text($("trynote"), sentence(error)); }
  });
}
