"""The chat form that both instruments share."""

BOS, END, USER, ASSISTANT, SYSTEM = SPECIAL_TOKENS = (
    "<|bos|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)


def chat_template(default_system: str = "") -> str:
    """Jinja source. `default_system` stands where the conversation brings no system message of its own."""
    start = "{{ bos_token }}"
    if default_system:
        start += "{% if messages[0]['role'] != 'system' %}" + SYSTEM + default_system + END + "{% endif %}"
    return (
        start
        + "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '"
        + END
        + "' }}{% endfor %}{% if add_generation_prompt %}"
        + ASSISTANT
        + "{% endif %}"
    )


def prompt_around_question(document: str, default_system: str = "") -> tuple[str, str]:
    """What the template puts before and after a question about a document, up to where the answer begins."""
    system = SYSTEM + default_system + END if default_system else ""
    return f"{BOS}{system}{USER}{user_message(document, '')}", f"{END}{ASSISTANT}"


def user_message(document: str, question: str) -> str:
    return f"{document}\n{question}"
