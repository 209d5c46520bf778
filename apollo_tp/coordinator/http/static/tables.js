// Feedback of clients, and which part of which tensor lies on which rank.
import { ask, get } from "./api.js";
import { $, el, keyed, figure, moment, number, show, text } from "./dom.js";
import { address, nameOf, state } from "./state.js";

const MAX_ROWS = 5000;
let tag = "";

export async function loadFeedback() {
  const f = await get("train/feedback?limit=10"), means = f.mean_rewards;
  show($("feedbackcard"), f.enabled);
  if (!f.enabled) return;
  const trend = means.length > 1 ? `, mean reward ${figure(means[0], 3)} in the first batch, ${figure(means.at(-1), 3)} in the last` : "";
  text($("feedbacknote"), `${number(f.waiting)} not learned yet${trend}`);
  const make = () => el("tr", {}, el("td"), el("td", { class: "name" }), el("td", { class: "wide" }), el("td"), el("td", { class: "num wide" }), el("td", { class: "name" }, el("a")));
  keyed($("feedback"), f.data, v => `${v.completion_id}/${v.choice}`, make, (row, v) => {
    const texts = [moment(v.created_at), v.session || "–", v.completion_id, v.corrected ? "corrected" : `reward ${figure(v.reward, 3)}`, number(v.weight_version)];
    texts.forEach((value, i) => text(row.cells[i], value));
    const kinds = v.corrected ? ["corrections", "preferences"] : ["rewards"], link = row.cells[5].firstChild;
    const job = [...state.jobs.values()].find(each => kinds.some(kind => each.spec.metadata?.learned_from === `${v.learned_in}/${kind}`));
    text(link, job ? nameOf(job) : v.learned_in || "not yet");
    if (job) link.setAttribute("href", address(job.id)); else link.removeAttribute("href");
  });
}

export async function loadLayout() {
  const { body, answer } = await ask("train/layout", { headers: tag ? { "If-None-Match": tag } : {} });
  if (!body || !body.data.length) return; // 304: it is shown already
  tag = answer.headers.get("ETag");
  const rows = body.data, columns = Object.keys(rows[0]);
  text($("layoutnote"), `${new Set(rows.map(r => r[columns[0]])).size} checkpoint tensors, ${new Set(rows.map(r => r.rank)).size} ranks`);
  $("layouthead").replaceChildren(el("tr", {}, ...columns.map(c => el("th", { scope: "col" }, c))));
  const shown = (row, c) => c === "rank" ? el("span", { class: "chip" }, row[c]) : el("code", {}, Array.isArray(row[c]) ? row[c].join(":") : row[c]);
  $("layout").replaceChildren(...rows.slice(0, MAX_ROWS).map(row => el("tr", {}, ...columns.map(c => el("td", {}, shown(row, c))))));
}
