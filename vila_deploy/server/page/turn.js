// One turn as it is shown: the question, its images, the answer and what stands under it.

import { button, element } from "./elements.js";
import { openSettings } from "./settings.js";

// A turn: {asked, images, answer} and its elements.
export function makeTurn(asked, images) {
  const turn = { asked, images, answer: "" };
  turn.text = document.createTextNode("");
  turn.output = element("div", { className: "answer", role: "group" }, turn.text);
  turn.output.setAttribute("aria-label", "Answer");
  // Read aloud when it is complete: until then it is busy.
  turn.output.setAttribute("aria-live", "polite");
  const dots = [1, 2, 3].map(() => element("i"));
  turn.waiting = element("div", { className: "waiting", hidden: true }, ...dots);
  turn.error = element("p", { className: "error", role: "alert" });
  turn.under = element("div", { className: "under" });
  const shown = images.map(({ url, name }) =>
    element("li", {}, element("img", { src: url, alt: name })),
  );
  const list = shown.length ? [element("ul", { "aria-label": "Images" }, ...shown)] : [];
  const said = element("div", { className: "asked" }, ...list, element("p", {}, asked));
  const parts = [said, turn.output, turn.waiting, turn.error, turn.under];
  turn.root = element("li", { className: "turn" }, ...parts);
  return turn;
}

export function beginAnswer(turn) {
  turn.answer = turn.text.data = turn.error.textContent = "";
  turn.root.classList.remove("failed");
  turn.under.replaceChildren();
  turn.waiting.hidden = false;
  turn.output.setAttribute("aria-busy", "true");
}

export function appendText(turn, text) {
  turn.answer += text;
  turn.waiting.hidden = true;
  turn.text.appendData(text);
}

// End an answer; `again` writes it anew, and is left out where later turns have built on it.
export function endAnswer(turn, { stopped, error, usage, reason }, clock, again) {
  turn.waiting.hidden = true;
  turn.output.setAttribute("aria-busy", "false");
  turn.root.classList.toggle("failed", !turn.answer);
  turn.error.textContent = error ? error.message : "";
  turn.under.replaceChildren();
  if (turn.answer) {
    turn.under.append(button("copy", "Copy", ({ currentTarget }) => copy(turn.answer, currentTarget)));
  }
  if (again) {
    turn.under.append(button("again", turn.answer ? "Regenerate" : "Try again", again));
    turn.under.lastChild.classList.add("again");
  }
  if (error?.status === 401) {
    turn.under.append(button("key", "Enter the key", () => openSettings("key")));
  }
  turn.under.append(element("span", { className: "figures" }, figures(stopped, usage, reason, clock)));
}

// Only the last answer can be written anew.
export function removeAgain(turn) {
  turn.under.querySelector(".again")?.remove();
}

function figures(stopped, usage, reason, { start, first, last }) {
  const parts = [];
  if (stopped) parts.push("stopped");
  if (reason === "length") parts.push("cut short at the limit of tokens");
  const tokens = usage?.completion_tokens ?? 0;
  if (tokens) parts.push(`${tokens} ${tokens === 1 ? "token" : "tokens"}`);
  if (tokens > 1 && last > first) {
    parts.push(`${significant(((tokens - 1) / (last - first)) * 1000)} tokens/s`);
  }
  if (first) parts.push(`first token after ${duration(first - start)}`);
  return parts.join(" · ");
}

const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${significant(ms / 1000)} s`);
const significant = (value) =>
  value.toLocaleString("en", { maximumSignificantDigits: 3, useGrouping: false });

async function copy(text, source) {
  const label = source.querySelector("span");
  try {
    await writeClipboard(text);
    label.textContent = "Copied";
  } catch {
    label.textContent = "Not copied";
  }
  setTimeout(() => (label.textContent = "Copy"), 1500);
}

async function writeClipboard(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Browsers offer no clipboard to a page that came by plain HTTP from another computer.
  const area = element("textarea", { value: text, className: "skip" });
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (!copied) throw new Error("refused");
}
