// What a person asks for: sent, refused in a sentence, and shown at once.
import { post, sentence } from "./api.js";
import { $, show, text } from "./dom.js";
import { state } from "./state.js";

let refused = false;
export const refresh = { now: () => {} };

/** A problem in the page's alert. One of an action stays until the next action, one of a refresh until one succeeds. */
export function problem(message, ofAction = false) {
  if (!message && refused && !ofAction) return;
  refused = Boolean(message) && ofAction;
  text($("problem"), message);
  show($("problem"), Boolean(message));
}

/** POST; null if it was refused, which is said. */
export async function act(path, body) {
  try {
    const answer = await post(path, body);
    problem("", true);
    refresh.now();
    return answer;
  } catch (error) {
    if (error.code === "scope") {
      state.readOnly = true;
      document.body.classList.add("readonly");
      for (const button of document.querySelectorAll("[data-trains]")) button.disabled = true;
    }
    problem(sentence(error), true);
    return null;
  }
}
