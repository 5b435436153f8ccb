// Finds the message of an error that is pasted, by the words that do not differ from case to case.
"use strict";

// The search reads some characters of errors and options as operators. Numbers of an error differ from case to case.
addEventListener("input", event => {
  const field = event.target;
  if (!field.matches(".md-search__input")) return;
  const plain = field.value.replace(/[:^~*+"]/g, " ").replace(/(^|\s)-+(?=\S)/g, "$1");
  const words = /^\w+Error\s/.test(plain) ? plain.replace(/\s\d\S*/g, "") : plain;
  if (words !== field.value) field.value = words;
}, true);

const box = document.getElementById("find-error");
if (box) {
  const entries = [...document.querySelectorAll(".error")].map(element => {
    const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT), pieces = [];
    while (walker.nextNode()) {
      const place = walker.currentNode.parentElement;
      if (place.matches(".message code, .do")) pieces.push(walker.currentNode.data);
    }
    return {element, pieces: pieces.map(simple).filter(piece => /\w\w/.test(piece))};
  });
  const found = box.querySelector("output"), field = box.querySelector("textarea");
  field.addEventListener("input", () => show(simple(field.value)));
  box.hidden = false;

  function simple(text) {
    return text.replace(/^\w+Error: /, "").replace(/\s+/g, " ").toLowerCase();
  }

  // The share of a message's fixed pieces, by length, that follow each other in the pasted text.
  function share(pieces, text) {
    let at = 0, seen = 0, all = 0;
    for (const piece of pieces) {
      const place = text.indexOf(piece.trim(), at);
      all += piece.length;
      if (place >= 0) [at, seen] = [place + piece.trim().length, seen + piece.length];
    }
    return seen < 8 ? 0 : seen / all + seen / 1e4;
  }

  function show(text) {
    const scored = entries.map(entry => ({entry, score: share(entry.pieces, text)})).filter(each => each.score > 0.4);
    const best = scored.sort((a, b) => b.score - a.score).slice(0, 3);
    const copies = best.map(({entry}) => {
      const copy = entry.element.cloneNode(true), title = copy.querySelector("h3"), line = document.createElement("p");
      line.className = "title";
      line.append(...title.childNodes);
      title.replaceWith(line);
      return copy;
    });
    found.replaceChildren(...copies);
    if (!copies.length && text.trim().length > 8) found.textContent = "No message is like this one.";
  }
}
