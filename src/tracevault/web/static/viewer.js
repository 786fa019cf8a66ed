// Comfort for the viewer. Every page works without it.

const search = document.querySelector("#q");
const help = document.querySelector(".help");

function rows() {
  return [...document.querySelectorAll("[data-row]")];
}

function move(step) {
  const all = rows();
  const here = all.findIndex((row) => row.contains(document.activeElement));
  const next = all[Math.min(all.length - 1, Math.max(0, here + step))];
  next?.querySelector("a")?.focus();
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select, [contenteditable]");
  if (event.key === "Escape" && typing) typing.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "j") move(1);
  else if (event.key === "k") move(-1);
  else if (event.key === "/" && search) search.select();
  else if (event.key === "?" && help) {
    help.open = !help.open;
    help.scrollIntoView();
    help.querySelector("summary").focus();
  } else return;
  event.preventDefault();
});

// How many events came since the page was made.
const live = document.querySelector("[data-live]");
if (live && "EventSource" in window) {
  let count = 0;
  let before = 0;
  const source = new EventSource(live.dataset.live);
  source.onmessage = (message) => {
    count = before + Number(message.data);
    live.querySelector("[data-count]").textContent = String(count);
    live.hidden = count === 0;
  };
  source.onerror = () => {
    before = count; // it begins anew
  };
  window.addEventListener("pagehide", () => source.close());
}

// What the word that is being typed could become.
if (search) {
  const list = document.querySelector("#suggestions");
  const suggest = async () => {
    const typed = search.value;
    const answer = await fetch(`${search.dataset.keys}?q=${encodeURIComponent(typed)}`).catch(() => null);
    if (!answer?.ok || typed !== search.value) return;
    const begin = typed.replace(/\S*$/, "");
    const options = (await answer.json()).map((word) => {
      const option = document.createElement("option");
      option.value = begin + word;
      return option;
    });
    list.replaceChildren(...options);
  };
  let soon = 0;
  search.addEventListener("input", () => {
    clearTimeout(soon);
    soon = setTimeout(suggest, 150);
  });
}

const copy = document.querySelector("[data-copy]");
if (copy && navigator.clipboard) {
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(location.href);
    copy.textContent = "copied";
  });
}
