// The page of vila-serve: a conversation with its model. Keyboard, files and buttons.

import { loadModel } from "./api.js";
import { addFiles, fit, question } from "./composer.js";
import { newChat, stopAnswer, submit } from "./conversation.js";
import { byId, say } from "./elements.js";
import { keepEndInView } from "./scrolling.js";
import { openSettings, sampling } from "./settings.js";

const isImage = (file) => file.type.startsWith("image/");
const hasFiles = (event) => event.dataTransfer.types.includes("Files");
let dragging; // a timer

function endDrag() {
  clearTimeout(dragging);
  byId("drop").hidden = true;
}

keepEndInView();
question.addEventListener("input", fit);
question.addEventListener("keydown", (event) => {
  // On a phone Enter breaks the line, and the button sends.
  const phone = matchMedia("(hover: none) and (pointer: coarse)").matches;
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || phone) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("settings").open) stopAnswer();
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
byId("stop").addEventListener("click", () => stopAnswer());
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
