// Elements of messages. Texts of anybody become text nodes; HTML comes from the server's Markdown alone.

import { post } from './api.js';

const policy = globalThis.trustedTypes?.createPolicy('markdown', { createHTML: (html) => html })
  ?? { createHTML: (html) => html };
const SHORTEST_PAUSE = 100;

// An element with properties and children.
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith('aria-')) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

export const button = (text, onclick, properties = {}) =>
  element('button', { type: 'button', onclick, ...properties }, text);

export async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers have a clipboard for pages of this machine or of HTTPS only.
    const area = element('textarea', { value: text });
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
  }
  const before = from.textContent;
  from.textContent = 'Copied';
  setTimeout(() => { from.textContent = before; }, 1200);
}

// Text of the model as Markdown: what the server has not rendered yet is plain text at its end.
export class MarkdownView {
  #shown = '';
  #text = '';
  #isBusy = false;
  #html = element('div', { className: 'markdown', dir: 'auto' });
  #rest = element('span', { className: 'rest' });
  root = element('div', { className: 'text' }, this.#html, this.#rest);

  set(text) {
    if (!text.startsWith(this.#shown)) this.#shown = '';
    this.#text = text;
    this.#showRest();
    this.#render();
  }

  #showRest() {
    this.#rest.textContent = this.#text.slice(this.#shown.length);
  }

  async #render() {
    if (this.#isBusy) return;
    this.#isBusy = true;
    while (this.#shown !== this.#text) {
      const text = this.#text;
      const started = performance.now();
      let html;
      try {
        html = await (await post('markdown', JSON.stringify({ text }))).text();
      } catch {
        // It stays plain text.
        break;
      }
      if (this.#text.startsWith(text)) {
        this.#html.innerHTML = policy.createHTML(html);
        this.#html.querySelectorAll('pre').forEach(addCopyButton);
        this.#shown = text;
        this.#showRest();
      }
      // A long text is rendered less often, as it takes longer.
      await new Promise((done) => { setTimeout(done, Math.max(SHORTEST_PAUSE, 3 * (performance.now() - started))); });
    }
    this.#isBusy = false;
  }
}

function addCopyButton(block) {
  const code = block.querySelector('code');
  const made = button('Copy', () => copy(code.textContent, made), { className: 'copy' });
  const frame = element('div', { className: 'code-frame' });
  block.replaceWith(frame);
  block.tabIndex = 0;
  frame.append(block, made);
}
