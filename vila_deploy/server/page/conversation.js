// The conversation: its turns, held in this page's memory alone, and the answer that is written.

import { chat, limits, model } from "./api.js";
import { question, takeImages } from "./composer.js";
import { byId, say } from "./elements.js";
import { scaleDown } from "./images.js";
import { showEnd } from "./scrolling.js";
import { openSettings, sampling, systemMessage } from "./settings.js";
import { appendText, beginAnswer, endAnswer, makeTurn, removeAgain } from "./turn.js";

let turns = [];
let running = null; // AbortController of the answer that is being written

export function submit() {
  const asked = question.value.trim();
  if (!asked || running) return;
  try {
    sampling();
  } catch (error) {
    return openSettings("temperature", error.message);
  }
  say("");
  question.value = "";
  byId("welcome").hidden = true;
  if (turns.length) removeAgain(turns.at(-1));
  const turn = makeTurn(asked, takeImages());
  turns.push(turn);
  byId("turns").append(turn.root);
  answer(turn);
}

export function stopAnswer() {
  running?.abort();
}

export function newChat() {
  stopAnswer();
  running = null;
  turns = [];
  byId("turns").replaceChildren();
  byId("welcome").hidden = false;
  say("");
  takeImages();
  showRunning();
  question.focus();
}

async function answer(turn) {
  const mine = (running = new AbortController());
  const clock = { start: performance.now(), first: 0, last: 0 };
  beginAnswer(turn);
  showRunning();
  showEnd();
  let ending = {};
  try {
    ending = await writeAnswer(turn, mine.signal, clock);
  } catch (error) {
    ending = mine.signal.aborted ? { stopped: true } : { error };
  }
  if (running === mine) running = null;
  const again = turn === turns.at(-1) && (() => running || answer(turn));
  endAnswer(turn, ending, clock, again);
  showRunning();
}

async function writeAnswer(turn, signal, clock) {
  const ending = {};
  for await (const chunk of chat(await body(turn), signal)) {
    ending.usage = chunk.usage ?? ending.usage;
    const [choice] = chunk.choices ?? [];
    if (!choice) continue;
    ending.reason = choice.finish_reason ?? ending.reason;
    const text = choice.delta?.content;
    if (!text) continue;
    clock.last = performance.now();
    clock.first ||= clock.last;
    appendText(turn, text);
  }
  return ending;
}

// The request for an answer; images are scaled down until it is as small as the server wants it.
async function body(turn) {
  const options = { model, stream: true, stream_options: { include_usage: true }, ...sampling() };
  const make = () => JSON.stringify({ messages: messages(turn), ...options });
  let text = make();
  const sent = turns.slice(0, turns.indexOf(turn) + 1).flatMap((one) => one.images);
  const tooLong = () => limits.max_body_bytes && text.length > limits.max_body_bytes;
  for (let round = 0; tooLong() && sent.length && round < 5; round++) {
    const scale = Math.min(0.9, Math.sqrt(limits.max_body_bytes / text.length));
    for (const image of sent) await scaleDown(image, scale);
    say("Images were scaled down: together they were larger than this server takes.");
    text = make();
  }
  return text;
}

function messages(last) {
  const system = systemMessage();
  const list = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns.slice(0, turns.indexOf(last) + 1)) {
    // A question without an answer is not part of the conversation.
    if (turn !== last && !turn.answer) continue;
    const text = { type: "text", text: turn.asked };
    const parts = turn.images.map(({ url }) => ({ type: "image_url", image_url: { url } }));
    list.push({ role: "user", content: parts.length ? [...parts, text] : turn.asked });
    if (turn !== last) list.push({ role: "assistant", content: turn.answer });
  }
  return list;
}

function showRunning() {
  const focused = document.activeElement;
  byId("stop").hidden = !running;
  byId("send").hidden = Boolean(running);
  byId("send").disabled = !question.value.trim();
  // A button that has gone must not take the focus with it; a phone's keyboard stays away.
  const lost = !focused || focused === document.body || focused.hidden || !focused.isConnected;
  if (lost && !matchMedia("(pointer: coarse)").matches) question.focus();
}
