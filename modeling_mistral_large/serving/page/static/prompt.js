// The dialog with the exact prompt: control tokens in the colours of their roles, ids on demand.

import { post } from './api.js';
import { element } from './view.js';

const ROLES = ['prompt', 'system', 'tools', 'user', 'assistant', 'results'];
const get = (id) => document.getElementById(id);

// Show the prompt of a conversation; `messages` may go on after those of the conversation.
export async function showPrompt(conversation, messages) {
  const prompt = await readPrompt(conversation, messages);
  const used = new Set(prompt.pieces.map((piece) => piece.role));
  get('prompt-count').textContent = `${prompt.tokens.toLocaleString('en')} tokens`
    + (prompt.format ? `, format ${prompt.format}` : '');
  get('legend').replaceChildren(...ROLES.filter((role) => used.has(role))
    .map((role) => element('span', { className: `role-${role}` }, role)));
  get('prompt-text').replaceChildren(...prompt.pieces.map((piece) => element('span', { className: 'piece' },
    element('span', { className: `role-${piece.role}${piece.is_control ? ' control' : ''}` }, piece.text),
    element('span', { className: 'ids' }, ` ${piece.ids.join(' ')} `))));
  get('prompt').showModal();
}

export async function readPrompt(conversation, messages) {
  return (await post('prompt', conversation.request({}, messages))).json();
}

get('close-prompt').onclick = () => get('prompt').close();
get('show-ids').onchange = (event) => get('prompt-text').classList.toggle('with-ids', event.target.checked);
