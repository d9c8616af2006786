// The server's API: its model and limits, and a chat whose answer is streamed.

import { byId, say } from "./elements.js";
import { headers, wrongKey } from "./settings.js";

export let model; // the server's name for it
export let limits = {}; // max_body_bytes, max_image_pixels

export async function loadModel() {
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

// Yield the chunks of an answer, as OpenAI's API has them; throws unless the stream ends as it should.
export async function* chat(body, signal) {
  const response = await post(body, signal);
  for await (const event of events(response.body)) {
    if (event === "[DONE]") return;
    const chunk = JSON.parse(event);
    if (chunk.error) throw new Error(sentence(chunk.error.message));
    yield chunk;
  }
  throw new Error("The connection ended before the answer did.");
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
