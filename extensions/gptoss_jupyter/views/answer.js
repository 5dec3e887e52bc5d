// The model's answer as it comes, message by message, each under its channel.

export default { render({ model, el }) {
  const parts = panel(el, model, 'gptoss-answer');
  const scroll = node('div', 'gptoss-messages');
  scroll.tabIndex = 0;
  scroll.setAttribute('role', 'log');
  scroll.setAttribute('aria-labelledby', parts.title.id);
  parts.body.append(scroll);

  const paint = () => {
    const atEnd = scroll.scrollTop + scroll.clientHeight >= scroll.scrollHeight - 12;
    const messages = model.get('messages'), running = model.get('running');
    messages.forEach((message, i) => {
      let row = scroll.children[i];
      if (!row) {
        row = node('div');
        row.append(node('span', 'gptoss-label'), node('span', 'gptoss-said'));
        scroll.append(row);
      }
      row.className = `gptoss-spoken gptoss-channel-${message.kind}`;
      row.classList.toggle('gptoss-writing', running && i === messages.length - 1);
      row.firstChild.textContent = message.label;
      const key = JSON.stringify(message.pieces);
      if (row.dataset.key !== key) { row.dataset.key = key; putPieces(row.lastChild, message.pieces); }
    });
    while (scroll.children.length > messages.length) scroll.lastChild.remove();
    if (atEnd) scroll.scrollTop = scroll.scrollHeight;
    parts.legend.textContent = model.get('note');
    parts.root.dataset.running = String(running);
    parts.detail.textContent = model.get('hint');
  };

  const painting = keepPainted(model, parts, paint);
  return () => painting.stop();
} };
