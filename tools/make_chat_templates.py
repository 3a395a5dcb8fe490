"""Writes tests/data/chat_templates.json: conversations rendered and encoded by transformers' apply_chat_template, with
tiny-chat's tokenizer, for several chat templates. Needs transformers and jinja2, no torch.

    python3 tools/make_chat_templates.py
"""

import json
from datetime import datetime
from pathlib import Path
from unittest import mock

from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

DATA = Path(__file__).parent.parent / "tests/data"

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Nemotron-Mini's: a blank line after the system text, contents stripped.
MINI = (
    "{{'<extra_id_0>System'}}{% for m in messages %}{% if m['role']=='system' %}{{'\\n' + m['content'].strip()}}"
    "{% endif %}{% endfor %}{{'\\n\\n'}}{% for m in messages %}{% if m['role']=='user' %}{{'<extra_id_1>User\\n' + "
    "m['content'].strip() + '\\n'}}{% elif m['role']=='assistant' %}{{'<extra_id_1>Assistant\\n' + "
    "m['content'].strip() + '\\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{'<extra_id_1>Assistant\\n'}}"
    "{% endif %}"
)
# The card's, as Jinja.
NEMOTRON = (
    "{{ '<extra_id_0>System\\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% set messages = messages[1:] %}{% endif %}{{ '\\n' }}{% for m in messages %}"
    "{{ '<extra_id_1>' + m.role | title + '\\n' + m.content + '\\n' }}{% endfor %}{{ '<extra_id_1>Assistant\\n' }}"
)
# In the manner of Llama 2 and 3: bos, alternation enforced, the date, trimmed contents.
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- "[SYS]Today Date: " + date_string + "\\n\\n" + system_message + "[/SYS]" }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'].strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'].strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""
# Blocks over lines, loop controls, generation tags, namespaces, macros, tojson, Python's methods.
KITCHEN = """{#- a comment -#}
{% set ns = namespace(count=0, seen=[]) %}
{% macro show(message, depth=0) %}
  <{{ message.role }}|{{ depth }}>
{% endmacro %}
{% for message in messages %}
    {% if message.content.startswith('skip') %}
        {% continue %}
    {% endif %}
    {% if 'stop' in message.content and loop.index0 > 2 %}
        {% break %}
    {% endif %}
    {% set ns.count = ns.count + 1 %}
    {{ show(message, depth=ns.count) }}
    {% if message.role == 'assistant' %}
    {% generation %}{{ message.content.rstrip('.!') }}{%- endgeneration -%}
    {% else %}
{{ message.content.split(' ')[0] | upper }} {{ message.content.split(' ')[1:] | join('_') }}
    {% endif %}
{% endfor %}
{{ messages | tojson }} {{ {'b': [1, 2.5, true, none], 'a': 'é"<'} | tojson(indent=2) }}
{{ messages[-1].items() | list | length }} {{ messages[0].get('name', 'nobody') }} {{ none }} {{ true }} {{ undefined }}
{{ tools is none }} {{ documents is none }} {{ ns.count }} {{ [1, 'two'] }} {{ 7 // 2 }} {{ 'a-b-c'.replace('-', '+') }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | first | trim | length }}
{% for k, v in {'z': 1, 'y': 2}.items() %}{{ k }}={{ v }}{{ ', ' if not loop.last else '' }}{% endfor %}
"""

USER, SYSTEM, ASSISTANT = "user", "system", "assistant"
CONVERSATIONS = [
    [(USER, "What is the capital of France?")],
    [(SYSTEM, "Be brief."), (USER, "What is the capital of France?")],
    [(SYSTEM, "  Answer in one word.\n"), (USER, " Hi \n"), (ASSISTANT, " Hello there. "), (USER, "é日🙂\ttab  spaces\r\nend")],
    [(USER, "skip me not"), (ASSISTANT, "Yes!"), (USER, "<extra_id_1>User\nI am a marker </s> <unk>")],
    [(USER, "a"), (ASSISTANT, "b"), (USER, "c"), (ASSISTANT, "d."), (USER, "stop now \"quoted\" \\ back")],
    [(ASSISTANT, "I begin."), (USER, "Then I go on.")],
    [(USER, "one"), (USER, "two")],
    [],
]
NOW = datetime(2024, 7, 5, 9, 3, 1)


def main():
    config = json.loads((DATA / "tiny-chat/tokenizer_config.json").read_text())
    specials = {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    out = {"now": "2024-07-05T09:03:01", "special_tokens": specials, "templates": []}
    templates = {"chatml": CHATML, "mini": MINI, "nemotron": NEMOTRON, "llama": LLAMA, "kitchen": KITCHEN}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DATA / "tiny-chat/tokenizer.json"), **specials)
    tokenizer.chat_template = templates
    with mock.patch.object(chat_template_utils, "datetime") as clock:
        clock.now.return_value = NOW
        for name, source in templates.items():
            cases = []
            for conversation in CONVERSATIONS:
                messages = [{"role": role, "content": content} for role, content in conversation]
                arguments = dict(chat_template=name, add_generation_prompt=True)
                try:
                    text = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
                    ids = tokenizer.apply_chat_template(messages, return_dict=False, **arguments)
                    escaped = tokenizer.apply_chat_template(
                        messages, return_dict=False, sanitize_control_tokens=True, **arguments
                    )
                    cases.append({"messages": messages, "text": text, "ids": ids, "escaped": escaped})
                except Exception as error:  # what the template itself raises
                    cases.append({"messages": messages, "error": str(error)})
            out["templates"].append({"name": name, "source": source, "cases": cases})
    path = DATA / "chat_templates.json"
    path.write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n")
    print(path, sum("ids" in c for t in out["templates"] for c in t["cases"]), "prompts")


if __name__ == "__main__":
    main()
