// The logit lens: for every layer, the tokens it would put next if the model ended there.

export default { render({ model, el }) {
  const parts = panel(el, model, 'gptoss-lens');
  const table = node('table', 'gptoss-lens-table');
  table.setAttribute('aria-labelledby', parts.title.id);
  parts.body.classList.add('gptoss-tall');
  parts.body.append(table);

  const paint = () => {
    const dark = isDark(), height = model.get('row_height'), columns = clamp(Math.floor((parts.body.clientWidth - 24) / 84), 2, 5);
    table.replaceChildren(...model.get('rows').map(([layer, cells]) => {
      const row = node('tr'), name = node('th', '', String(layer));
      name.scope = 'row';
      row.style.height = `${height}px`;
      row.append(name, ...cells.slice(0, columns).map((cell, rank) => {
        const place = node('td'), text = node('span', 'gptoss-guess'), colour = shade(cell.prob, dark);
        putPieces(text, cell.pieces);
        place.style.backgroundColor = css(colour);
        place.style.color = ink(colour);
        place.title = `layer ${layer}, rank ${rank + 1}: ${piecesText(cell.pieces)}, ${percent(cell.prob)}`;
        place.setAttribute('aria-label', place.title);
        place.append(text);
        return place;
      }));
      return row;
    }));
    showLegend(parts.legend, 0, 1, 'probability', dark);
    parts.detail.textContent = model.get('hint');
  };
  table.addEventListener('mouseover', event => {
    const cell = event.target.closest?.('td');
    parts.detail.textContent = cell ? cell.title : model.get('hint');
  });
  table.addEventListener('mouseleave', () => { parts.detail.textContent = model.get('hint'); });

  const painting = keepPainted(model, parts, paint);
  return () => painting.stop();
} };
