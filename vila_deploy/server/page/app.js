// The page of vila-serve: one conversation with its model, held in this page's memory alone.
// Whatever comes from the server or from a file name enters the page as a text node.

const byId = (id) => document.getElementById(id);
const scroller = byId("scroller"), question = byId("question"), notice = byId("notice");

// What the server decodes; browsers read more kinds, which are redrawn as PNG.
const SENT_AS_THEY_ARE = new Set(["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"]);
const ICONS = {
  copy: ["M9 9h10v11H9z", "M15 9V4H5v11h4"],
  again: ["M20 11a8 8 0 1 0-2.3 5.7", "M20 4v7h-7"],
  remove: ["M6 6l12 12", "M18 6L6 18"],
  key: ["M14.5 9.5a4 4 0 1 0-4 4 4 4 0 0 0 4-4", "M13.5 12.5L20 19", "M17 16l-2 2"],
};

let turns = []; // {asked, images, answer, failed, root, under, …}
let images = []; // of the next question: {name, url, width, height}
let running = null; // AbortController of the answer that is being written
let model; // the server's name for it
let limits = {}; // of the server: max_body_bytes, max_image_pixels

// ---- Elements

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  for (const d of ICONS[name]) {
    const path = document.createElementNS(svg.namespaceURI, "path");
    path.setAttribute("d", d);
    svg.append(path);
  }
  return svg;
}

function button(name, label, onclick) {
  return element("button", { type: "button", onclick }, icon(name), element("span", {}, label));
}

function say(text, isError = false) {
  notice.textContent = text;
  notice.classList.toggle("error", isError);
}

// ---- Images of the next question

async function addFiles(files) {
  say("");
  for (const file of files) {
    try {
      images.push(await readImage(file));
    } catch {
      say(`${file.name || "What was pasted"} is not an image that this browser can read.`, true);
    }
  }
  showImages();
  question.focus();
}

async function readImage(file) {
  const url = await dataUrl(file);
  const decoded = await decode(url);
  const [width, height] = [decoded.naturalWidth, decoded.naturalHeight];
  const image = { name: file.name || "image", url, width, height };
  if (!SENT_AS_THEY_ARE.has(file.type)) {
    image.url = redrawn(decoded, 1, "image/png");
    say(`${image.name} is sent as PNG.`);
  }
  const pixels = image.width * image.height;
  if (limits.max_image_pixels && pixels > limits.max_image_pixels) {
    await scaleDown(image, Math.sqrt(limits.max_image_pixels / pixels));
    const size = `${image.width} × ${image.height}`;
    say(`${image.name} was scaled down to ${size}, the most that this server takes.`);
  }
  return image;
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

async function decode(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

function redrawn(decoded, scale, type) {
  const canvas = element("canvas", {
    // An SVG without a size has none.
    width: Math.max(1, Math.floor((decoded.naturalWidth || 512) * scale)),
    height: Math.max(1, Math.floor((decoded.naturalHeight || 512) * scale)),
  });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(decoded, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL(type, 0.92);
}

async function scaleDown(image, scale) {
  const decoded = await decode(image.url);
  image.url = redrawn(decoded, scale, "image/jpeg");
  const scaled = await decode(image.url);
  [image.width, image.height] = [scaled.naturalWidth, scaled.naturalHeight];
}

function showImages() {
  const remove = (index) => {
    images.splice(index, 1);
    showImages();
    (byId("images").querySelectorAll("button")[index] ?? question).focus();
  };
  byId("images").replaceChildren(
    ...images.map((image, index) => {
      const shown = element("img", { src: image.url, alt: image.name, title: image.name });
      const button = element("button", { type: "button", title: "Remove" }, icon("remove"));
      button.setAttribute("aria-label", `Remove ${image.name}`);
      button.onclick = () => remove(index);
      return element("li", {}, shown, button);
    }),
  );
  fit();
}

// ---- Settings

function number(id, name) {
  const input = byId(id);
  const kind = input.step === "1" ? "a whole number" : "a number";
  if (!input.validity.valid) throw new Error(`${name} must be ${kind} ${range(input)}.`);
  return input.value === "" ? undefined : Number(input.value);
}

function range({ id, min, max }) {
  if (id === "top_p") return "above 0, at most 1";
  return max ? `from ${min} to ${max}` : `of at least ${min}`;
}

// Fields that are left empty are not sent: the server's defaults hold.
function sampling() {
  const stop = byId("stop-strings").value.split("\n").filter(Boolean);
  return {
    temperature: number("temperature", "Temperature"),
    top_p: number("top_p", "Top p"),
    max_tokens: number("max_tokens", "Max tokens"),
    stop: stop.length ? stop : undefined,
  };
}

function openSettings(field, message = "") {
  byId("settings-error").textContent = message;
  if (!byId("settings").open) byId("settings").showModal();
  byId(field).focus();
}

function headers() {
  const key = byId("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function loadModel() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401) return say(wrongKey(), true);
    const [first] = (await response.json()).data;
    model = byId("model").textContent = document.title = first.id;
    limits = first.limits ?? {};
    say("");
  } catch {
    say("The server cannot be reached.", true);
  }
}

const wrongKey = () =>
  byId("key").value
    ? "The server does not know this API key. Correct it in Settings."
    : "This server asks for an API key. Enter it in Settings.";

// ---- Turns

function messages(last) {
  const system = byId("system").value.trim();
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

function addTurn(asked) {
  const shown = images.map(({ url, name }) =>
    element("li", {}, element("img", { src: url, alt: name })),
  );
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
  const list = shown.length ? [element("ul", { "aria-label": "Images" }, ...shown)] : [];
  const said = element("div", { className: "asked" }, ...list, element("p", {}, asked));
  const parts = [said, turn.output, turn.waiting, turn.error, turn.under];
  turn.root = element("li", { className: "turn" }, ...parts);
  images = [];
  turns.push(turn);
  byId("turns").append(turn.root);
  showImages();
  return turn;
}

function submit() {
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
  // Only the last answer can be written anew.
  turns.at(-1)?.under.querySelector(".again")?.remove();
  answer(addTurn(asked));
}

async function answer(turn) {
  const mine = (running = new AbortController());
  const clock = { start: performance.now(), first: 0, last: 0 };
  begin(turn);
  let ending = {};
  try {
    ending = await stream(turn, mine.signal, clock);
  } catch (error) {
    ending = mine.signal.aborted ? { stopped: true } : { error };
  }
  if (running === mine) running = null;
  finish(turn, ending, clock);
}

function begin(turn) {
  turn.answer = turn.text.data = turn.error.textContent = "";
  turn.root.classList.remove("failed");
  turn.under.replaceChildren();
  turn.waiting.hidden = false;
  turn.output.setAttribute("aria-busy", "true");
  showRunning();
  showEnd();
}

function finish(turn, { stopped, error, usage, reason }, clock) {
  turn.waiting.hidden = true;
  turn.output.setAttribute("aria-busy", "false");
  turn.root.classList.toggle("failed", !turn.answer);
  turn.error.textContent = error ? error.message : "";
  turn.under.replaceChildren();
  if (turn.answer) {
    turn.under.append(button("copy", "Copy", ({ currentTarget }) => copy(turn.answer, currentTarget)));
  }
  if (turn === turns.at(-1)) {
    const label = turn.answer ? "Regenerate" : "Try again";
    turn.under.append(button("again", label, () => running || answer(turn)));
    turn.under.lastChild.classList.add("again");
  }
  if (error?.status === 401) {
    turn.under.append(button("key", "Enter the key", () => openSettings("key")));
  }
  turn.under.append(element("span", { className: "figures" }, figures(stopped, usage, reason, clock)));
  showRunning();
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

function showRunning() {
  const focused = document.activeElement;
  byId("stop").hidden = !running;
  byId("send").hidden = Boolean(running);
  byId("send").disabled = !question.value.trim();
  // A button that has gone must not take the focus with it; a phone's keyboard stays away.
  const lost = !focused || focused === document.body || focused.hidden || !focused.isConnected;
  if (lost && !matchMedia("(pointer: coarse)").matches) question.focus();
}

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

// ---- The server's API

async function stream(turn, signal, clock) {
  const response = await post(await body(turn), signal);
  const ending = {};
  for await (const event of events(response.body)) {
    if (event === "[DONE]") return ending;
    const chunk = JSON.parse(event);
    if (chunk.error) throw new Error(sentence(chunk.error.message));
    ending.usage = chunk.usage ?? ending.usage;
    const [choice] = chunk.choices ?? [];
    if (!choice) continue;
    ending.reason = choice.finish_reason ?? ending.reason;
    const text = choice.delta?.content;
    if (!text) continue;
    clock.last = performance.now();
    clock.first ||= clock.last;
    turn.answer += text;
    turn.waiting.hidden = true;
    turn.text.appendData(text);
  }
  throw new Error("The connection ended before the answer did.");
}

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

async function post(body, signal) {
  let response;
  try {
    response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body, signal });
  } catch (error) {
    throw signal.aborted ? error : new Error("The server cannot be reached.");
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  const error = new Error(reason(response, problem.error?.message));
  throw Object.assign(error, { status: response.status });
}

function reason({ status, headers }, message) {
  if (status === 401) return wrongKey();
  const wait = headers.get("Retry-After");
  if (status === 429 || status === 503) {
    return `The server is busy: try again ${wait ? `in ${wait} s` : "later"}.`;
  }
  return message ? sentence(message) : `The server answered with status ${status}.`;
}

// The server's errors begin with the field that they are about, if any: that stays as it is.
function sentence(text) {
  const ended = /[.!?]$/.test(text) ? text : `${text}.`;
  return /^[\w.[\]]+:/.test(ended) ? ended : ended.replace(/^./u, (letter) => letter.toUpperCase());
}

// Server-sent events: yield what stands behind "data:" in each.
async function* events(stream) {
  let rest = "";
  const decoder = new TextDecoder(), reader = stream.getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const blocks = rest.split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

// ---- Keyboard, files, buttons, scrolling

function fit() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  byId("send").disabled = !question.value.trim();
}

function newChat() {
  running?.abort();
  running = null;
  [turns, images] = [[], []];
  byId("turns").replaceChildren();
  byId("welcome").hidden = false;
  say("");
  showImages();
  showRunning();
  question.focus();
}

// The end stays in view while answers and question grow, unless the reader has scrolled up.
let atEnd = true;
const growth = new ResizeObserver(() => atEnd && showEnd());

function showEnd() {
  atEnd = true;
  scroller.scrollTop = scroller.scrollHeight;
}

let dragging; // a timer

function endDrag() {
  clearTimeout(dragging);
  byId("drop").hidden = true;
}

const isImage = (file) => file.type.startsWith("image/");
const hasFiles = (event) => event.dataTransfer.types.includes("Files");

growth.observe(scroller);
growth.observe(byId("turns"));
scroller.addEventListener("scroll", () => {
  atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
});
question.addEventListener("input", fit);
question.addEventListener("keydown", (event) => {
  // On a phone Enter breaks the line, and the button sends.
  const phone = matchMedia("(hover: none) and (pointer: coarse)").matches;
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || phone) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("settings").open) running?.abort();
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files].filter(isImage);
  // Spreadsheets put their cells there as text and as an image: then the text is meant.
  if (!files.length || event.clipboardData.getData("text/plain") || byId("settings").open) return;
  event.preventDefault();
  addFiles(files);
});
document.addEventListener("dragover", (event) => {
  if (!hasFiles(event) && event.target === question) return;
  event.preventDefault();
  byId("drop").hidden = !hasFiles(event);
  // It comes some times a second; a drag that is given up says nothing.
  clearTimeout(dragging);
  dragging = setTimeout(endDrag, 1000);
});
document.addEventListener("dragleave", (event) => event.relatedTarget || endDrag());
document.addEventListener("drop", (event) => {
  endDrag();
  if (!hasFiles(event) && event.target === question) return;
  event.preventDefault();
  if (hasFiles(event)) addFiles([...event.dataTransfer.files]);
  else say("Only image files can be dropped here.", true);
});
byId("add").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", ({ target }) => {
  addFiles([...target.files]);
  target.value = "";
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("new").addEventListener("click", newChat);
byId("open-settings").addEventListener("click", () => openSettings("key"));
byId("settings").addEventListener("submit", (event) => {
  try {
    sampling();
  } catch (error) {
    event.preventDefault();
    byId("settings-error").textContent = error.message;
  }
});
byId("key").addEventListener("change", loadModel);
for (const example of byId("examples").querySelectorAll("button")) {
  example.addEventListener("click", () => {
    question.value = example.textContent;
    fit();
    question.focus();
  });
}

loadModel();
question.focus();
