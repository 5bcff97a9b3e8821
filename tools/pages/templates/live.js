// Fetches a live page again and puts its new contents in place.
const main = document.querySelector("main"), live = document.getElementById("live");
if (live) {
  const follow = document.getElementById("follow"), said = document.getElementById("said");
  const often = document.getElementById("often");
  const named = each => each.firstElementChild ? each.firstElementChild.textContent.split(":")[0] : "";
  const put = fresh => {
    const open = new Set([...main.querySelectorAll("details[open]")].map(named));
    fresh.querySelectorAll("details").forEach(each => { each.open = open.has(named(each)); });
    main.replaceChildren(...fresh.childNodes);
  };
  const look = async () => {
    if (follow.checked && !document.hidden) {
      try {
        const answer = await fetch(location.href, { cache: "no-store" });
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        const fresh = page.querySelector("main");
        if (fresh.dataset.stamp !== main.dataset.stamp) put(fresh);
        Object.assign(main.dataset, fresh.dataset);
        often.textContent = main.dataset.every;
        said.textContent = Number(main.dataset.every) ? "" : "It is finished.";
      } catch (error) {
        said.textContent = "The viewer does not answer; trying again.";
      }
    }
    if (Number(main.dataset.every)) setTimeout(look, 1000 * Number(main.dataset.every));
  };
  live.hidden = false;
  setTimeout(look, 1000 * Number(main.dataset.every));
}
