"use strict";
// Draws the charts of the page.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const MOST_NAMES = 150; // bars that are named at a time

  function draw(place, chart) {
    const narrow = place.clientWidth < 600;
    const config = { displaylogo: false, responsive: true, scrollZoom: Boolean(chart.windows), displayModeBar: !narrow && Boolean(chart.windows), modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
    return Plotly.newPlot(place, chart.data, chart.layout, config).then(() => {
      if (!chart.windows) return;
      place.before(buttons(place, chart.windows));
      place.on("plotly_relayout", () => name_bars(place));
    });
  }

  // A button for each window of time.
  function buttons(place, windows) {
    const row = document.createElement("div");
    row.className = "windows";
    for (const { name, range } of windows) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = name;
      button.addEventListener("click", () => Plotly.relayout(place, { "xaxis.range": range.slice() }));
      row.append(button);
    }
    return row;
  }

  // Names stand in the bars once few enough of them are seen.
  function name_bars(place) {
    const [begin, end] = place.layout.xaxis.range;
    const seen = (trace, i) => trace.base[i] < end && trace.base[i] + trace.x[i] > begin;
    let count = 0;
    for (const trace of place.data) trace.x.forEach((_, i) => { if (seen(trace, i)) count += 1; });
    const few = count <= MOST_NAMES;
    if (!few && !place.dataset.named) return;
    place.dataset.named = few ? "yes" : "";
    const text = place.data.map(trace => few ? trace.x.map((_, i) => seen(trace, i) ? trace.customdata[i][0] : "") : "");
    Plotly.restyle(place, { text });
  }

  // One after the other, so that the first are seen at once.
  async function draw_all() {
    for (const [number, chart] of charts.entries()) {
      await draw(document.getElementById(`chart-${number}`), chart);
      await new Promise(resolve => setTimeout(resolve));
    }
    document.body.dataset.ready = "yes";
  }
  draw_all();
})();
