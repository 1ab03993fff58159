"""transformers' text-generation pipeline, with responses and texts that equal all ids decoded at once."""

from typing import Any

from transformers import TextGenerationPipeline
from transformers.pipelines.text_generation import ReturnType

from mistral_large_conversion.chat_templates import response_format_of
from mistral_large_conversion.vocabulary import NEWLINE_ID
from modeling_mistral_large.tokenization_mistral_large import MistralLargeTokenizer


class MistralLargeTextGenerationPipeline(TextGenerationPipeline):
    """The pipeline that `pipeline("text-generation")` makes; for other tokenizers it is transformers' own.

    transformers decodes the ids after the prompt on their own: the space in front of their first word would be taken
    for the one the tokenizer puts before every text, and dropped. It reads responses from their text, in which a
    control string that was spelled out looks like the token.
    """

    def postprocess(  # type: ignore[override]  # the base classes disagree with each other
        self, model_outputs: Any, return_type: Any = ReturnType.FULL_TEXT, **options: Any
    ) -> Any:
        """Return the records of transformers' method, which has these options."""
        read: Any = super().postprocess
        records = read(model_outputs, return_type, **options)
        prompt_ids = model_outputs["input_ids"]
        tokenizer: Any = self.tokenizer
        if not isinstance(tokenizer, MistralLargeTokenizer) or prompt_ids is None:
            return records
        prompt: list[int] = prompt_ids[0].tolist()
        given = model_outputs["prompt_text"]
        ends_in_text = bool(prompt) and prompt[-1] not in tokenizer.vocabulary.control_ids
        for record, sequence in zip(records, model_outputs["generated_sequence"][0].tolist(), strict=True):
            ids = sequence[len(prompt) :]
            if return_type == ReturnType.TENSORS:
                continue
            if isinstance(given, str):
                # Options of raw texts: with a response template transformers keeps the control tokens whatever is said.
                is_skipped = options.get("skip_special_tokens") is not False
                is_full = return_type == ReturnType.FULL_TEXT
                text = self._text(ids, goes_on=bool(given) and (is_full or ends_in_text), skip=is_skipped)
                record["generated_text"] = given + text if is_full else text
            elif return_type == ReturnType.NEW_TEXT:
                record["generated_text"] = self._text(ids, goes_on=ends_in_text, skip=False)
            elif response_format_of(tokenizer.response_template) is not None:
                continues = options.get("continue_final_message")
                if continues is None:
                    continues = given.messages[-1]["role"] == "assistant"
                message = tokenizer.parse_response(ids, prefix=prompt)
                record["generated_text"] = _with_answer(list(given.messages), message, continues=bool(continues))
        return records

    def _text(self, ids: list[int], *, goes_on: bool, skip: bool) -> str:
        """Return the text of ids, which go on from another text or begin one."""
        tokenizer: Any = self.tokenizer
        text: str = tokenizer.decode([NEWLINE_ID, *ids] if goes_on else ids, skip_special_tokens=skip)
        return text.removeprefix("\n") if goes_on else text


def _with_answer(messages: list[Any], answer: dict[str, Any], *, continues: bool) -> list[Any]:
    if not continues:
        return [*messages, answer]
    *messages, begun = messages
    content = begun["content"]
    if isinstance(content, str):
        # The prompt has it without its final spaces.
        content = content.rstrip(" ") + answer["content"]
    else:
        content = [*content, {"type": "text", "text": answer["content"]}]
    return [*messages, {**answer, "role": begun["role"], "content": content}]
