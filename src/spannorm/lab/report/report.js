// The report: still figures become charts as they come into view, and a legend hides arms in all charts below it.
if (live.supported()) {
  for (const part of document.querySelectorAll(".part:has(.live)")) {
    const buttons = [...part.querySelectorAll(".names button[data-arm]")];
    const names = buttons.map((button) => button.querySelector(".name").textContent);
    const hidden = new Set();
    const charts = [];
    const refresh = () => {
      buttons.forEach((button, arm) => button.setAttribute("aria-pressed", String(!hidden.has(arm))));
      for (const chart of charts) chart.show();
    };
    buttons.forEach((button, arm) => button.addEventListener("click", () => {
      if (!hidden.delete(arm)) hidden.add(arm);
      refresh();
    }));
    for (const [className, hide] of [["every", false], ["none", true]])
      part.querySelector(`.names .${className}`)?.addEventListener("click", () => {
        hidden.clear();
        if (hide) buttons.forEach((_, arm) => hidden.add(arm));
        refresh();
      });

    const start = async (figure) => {
      const host = figure.querySelector(".live");
      const spec = JSON.parse(await live.unpacked(figure.querySelector(".numbers")));
      await live.library();
      host.hidden = false;
      figure.classList.add("moving");
      const chart = new live.Chart(host, spec, names, hidden);
      charts.push(chart);
      const group = charts.filter((other) => other.spec.group === spec.group);
      for (const other of group) other.peers = group;
      [chart.logX, chart.zoom] = [group[0].logX, group[0].zoom];
      await chart.draw();
    };
    const watch = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries)
        if (isIntersecting) {
          watch.unobserve(target);
          start(target);
        }
    }, { rootMargin: "600px 0px" });
    for (const host of part.querySelectorAll(".live")) watch.observe(host.closest("figure"));
    part.classList.add("answering");
  }
}
