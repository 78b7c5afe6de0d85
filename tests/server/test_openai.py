"""The OpenAI routes, with the `openai` client: sync, async and streaming."""

import asyncio
import json

import openai
import pytest
import torch

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def server(serve, tmp_path_factory):
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    file.write_text(TEMPLATE)
    return serve({"served_model_name": "tiny", "chat_template": str(file)})


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, **options):
    return client.completions.create(
        **{
            "model": "tiny",
            "max_tokens": 5,
            "temperature": 0,
            "extra_body": {"ignore_eos": True},
            **options,
        }
    )


def native(http, **body):
    params = {"max_new_tokens": 5, "temperature": 0, "ignore_eos": True}
    return http.post("/generate", json={"sampling_params": params, **body}).json()


def test_the_model_is_listed_and_found(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        complete(client, model="other", prompt="a")


def test_a_completion_is_the_engines_own(client, http):
    expected = native(http, text="the heron")
    for prompt in (
        "the heron",
        http.post("/tokenize", json={"prompt": "the heron"}).json()["tokens"],
    ):
        found = complete(client, prompt=prompt)
        assert found.choices[0].text == expected["text"]
        assert found.choices[0].finish_reason == "length"
        assert found.usage.completion_tokens == 5
        assert found.usage.prompt_tokens == expected["meta_info"]["prompt_tokens"]
    assert found.metadata["weight_version"] == "0"
    assert found.metadata["weight_versions"][0][0]["end"] == 5


def test_several_prompts_and_samples_are_choices_prompt_major(client):
    found = complete(client, prompt=["a", "bb"], n=2, seed=7, temperature=1)
    again = complete(client, prompt=["a", "bb"], n=2, seed=7, temperature=1)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [c.text for c in found.choices] == [c.text for c in again.choices]
    assert found.choices[0].text != found.choices[1].text
    assert found.usage.prompt_tokens == 3 and found.usage.completion_tokens == 20


def test_token_ids_come_out_on_request(client, http):
    extra = {"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True}
    choice = complete(client, prompt=[1, 2, 3], logprobs=1, extra_body=extra).choices[0]
    expected = native(http, input_ids=[1, 2, 3])["output_ids"]
    assert choice.token_ids == expected and choice.prompt_token_ids == [1, 2, 3]
    assert choice.logprobs.tokens == [f"token_id:{token}" for token in expected]


def test_echoed_logprobs_are_the_reference_models(client, folder, reference_model):
    ids = [10, 20, 30, 40]
    found = complete(client, prompt=ids, max_tokens=1, echo=True, logprobs=1, seed=1).choices[0]
    logits = reference_model(folder)(torch.tensor([ids])).logits[0]
    rows = logits.log_softmax(-1)
    expected = [rows[i, ids[i + 1]].item() for i in range(3)]
    assert found.logprobs.token_logprobs[0] is None
    assert found.logprobs.token_logprobs[1:4] == pytest.approx(expected, abs=1e-4)
    assert len(found.logprobs.tokens) == len(found.logprobs.top_logprobs) == 5
    best = [max(top.values()) for top in found.logprobs.top_logprobs[1:]]
    assert best == pytest.approx(rows.max(-1).values.tolist(), abs=1e-4)
    assert found.logprobs.text_offset[:2] == [0, len(found.logprobs.tokens[0])]


def test_prompt_logprobs_are_rows_by_token_id(client):
    extra = {"prompt_logprobs": 2}
    choice = complete(client, prompt=[5, 6, 7], extra_body=extra).choices[0]
    assert choice.prompt_logprobs[0] is None
    assert all(
        str(token) in row for token, row in zip([6, 7], choice.prompt_logprobs[1:], strict=True)
    )
    assert choice.prompt_logprobs[1]["6"]["logprob"] < 0


def test_a_prompt_alone_can_be_scored(client):
    found = complete(client, prompt="the the", max_tokens=0, echo=True, logprobs=0)
    assert found.choices[0].text == "the the" and found.usage.completion_tokens == 0


def test_stop_strings_end_the_text_and_are_told(client, http):
    text = native(
        http, input_ids=[9, 8, 7], sampling_params={"max_new_tokens": 12, "temperature": 0}
    )
    words = [choice for choice in text["text"] if choice.isascii() and choice.isalnum()]
    stop = words[-1] if words else text["text"][-1]
    choice = complete(client, prompt=[9, 8, 7], max_tokens=12, stop=[stop]).choices[0]
    assert choice.finish_reason == "stop" and choice.stop_reason == stop and stop not in choice.text


def test_a_streamed_completion_adds_up_to_the_whole(client):
    whole = complete(client, prompt="the", logprobs=2)
    chunks = list(
        complete(
            client, prompt="the", logprobs=2, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    tokens = [token for chunk in chunks[:-1] for token in chunk.choices[0].logprobs.tokens]
    assert tokens == whole.choices[0].logprobs.tokens
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 5
    assert chunks[-2].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1


MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the heron?"}]
RENDERED = "<system>be brief\n<user>the heron?\n<assistant>"


def chat(client, **options):
    return client.chat.completions.create(
        **{
            "model": "tiny",
            "messages": MESSAGES,
            "max_tokens": 5,
            "temperature": 0,
            "extra_body": {"ignore_eos": True},
            **options,
        }
    )


def test_a_chat_is_rendered_by_the_template(client, http):
    expected = native(http, text=RENDERED)
    found = chat(client, logprobs=True, top_logprobs=2)
    message = found.choices[0].message
    assert (message.role, message.content) == ("assistant", expected["text"])
    content = found.choices[0].logprobs.content
    assert len(content) == 5 and all(len(entry.top_logprobs) == 2 for entry in content)
    assert content[0].logprob == content[0].top_logprobs[0].logprob
    parts = [{"role": "user", "content": [{"type": "text", "text": "the heron?"}]}]
    assert (
        chat(client, messages=[MESSAGES[0], *parts]).choices[0].message.content == message.content
    )
    ids = http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    body = {"input_ids": ids, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == message.content


def test_a_chat_without_a_limit_may_fill_the_context(client):
    options = {"max_tokens": openai.NOT_GIVEN, "extra_body": {"ignore_eos": True}}
    found = chat(client, **options)
    assert found.usage.total_tokens == 512 and found.choices[0].finish_reason == "length"


def test_a_streamed_chat_adds_up_with_samples_apart(client):
    whole = chat(client, n=2, seed=3, temperature=1)
    texts, roles = {0: "", 1: ""}, {}
    for chunk in chat(client, n=2, seed=3, temperature=1, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles.setdefault(choice.index, choice.delta.role)
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert roles == {0: "assistant", 1: "assistant"}


def test_asynchronous_clients_stream_side_by_side(server, client):
    expected = complete(client, prompt="the").choices[0].text

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as many:

            async def one():
                chunks = await complete(many, prompt="the", stream=True)
                return "".join([chunk.choices[0].text async for chunk in chunks])

            return await asyncio.gather(*(one() for _ in range(8)))

    assert set(asyncio.run(run())) == {expected}


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("completions", {}, 400, "prompt"),
        ("completions", {"prompt": []}, 400, "prompt"),
        ("completions", {"prompt": ["a", 1]}, 400, "mixture"),
        ("completions", {"prompt": "a", "n": 0}, 400, "n"),
        ("completions", {"prompt": "a", "logprobs": -1}, 400, "logprobs"),
        ("completions", {"prompt": "a", "best_of": 3}, 400, "best_of"),
        ("completions", {"prompt": "a", "suffix": "b"}, 501, "suffix"),
        ("completions", {"prompt": "a", "temprature": 1}, 400, "temperature"),
        ("chat/completions", {}, 400, "messages"),
        ("chat/completions", {"messages": [{"content": "a"}]}, 400, "role"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "text",
        ),
        (
            "chat/completions",
            {"messages": MESSAGES, "chat_template_kwargs": {"chat_template": "x"}},
            400,
            "chat_template",
        ),
        (
            "chat/completions",
            {"messages": MESSAGES, "response_format": {"type": "json_object"}},
            501,
            "response_format",
        ),
        ("chat/completions", {"messages": MESSAGES, "tool_choice": "required"}, 501, "tool_choice"),
    ],
)
def test_what_cannot_be_is_refused_in_the_clients_shape(http, path, body, status, word):
    reply = http.post(f"/v1/{path}", json=body)
    assert reply.status_code == status and word in reply.json()["error"]["message"]


def test_a_model_without_a_template_says_so(serve):
    import httpx

    bare = serve()
    reply = httpx.post(f"{bare.url}/v1/chat/completions", json={"messages": MESSAGES}, timeout=60)
    assert reply.status_code == 400 and "template" in reply.json()["message"]


def test_scores_are_probabilities_of_the_labels(http, folder, reference_model):
    body = {"query": [1, 2], "items": [[3], [4, 5]], "label_token_ids": [7, 8]}
    found = http.post("/v1/score", json=body).json()["scores"]
    logits = reference_model(folder)(torch.tensor([[1, 2, 3]])).logits[0, -1]
    assert found[0] == pytest.approx(logits.softmax(-1)[[7, 8]].tolist(), abs=1e-5)
    softmax = http.post("/v1/score", json={**body, "apply_softmax": True}).json()["scores"]
    assert [sum(row) for row in softmax] == pytest.approx([1.0, 1.0])
    assert http.post("/v1/score", json={**body, "label_token_ids": []}).status_code == 400


def test_scores_of_text_are_those_of_its_tokens(http):
    labels = {"label_token_ids": [7, 8]}
    items = ["the", " heron \u00e9"]
    for item_first in (False, True):
        found = http.post(
            "/v1/score",
            json={"query": "a b", "items": items, "item_first": item_first, **labels},
        ).json()["scores"]
        whole = [item + "a b" if item_first else "a b" + item for item in items]
        ids = [http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in whole]
        expected = http.post("/v1/score", json={"query": [], "items": ids, **labels}).json()
        assert found == expected["scores"]
    mixed = http.post("/v1/score", json={"query": "a", "items": ["b", [1]], **labels})
    assert mixed.status_code == 400 and "mixed" in mixed.json()["error"]["message"]


@pytest.mark.parametrize(("query", "item"), [("a" * 100_000, "b"), ([1] * 100_000, [2])])
def test_a_query_counts_once_for_each_item(http, query, item):
    body = {"query": query, "items": [item] * 1000, "label_token_ids": [7]}
    reply = http.post("/v1/score", json=body)
    assert reply.status_code == 413 and "100,001,000" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "%"}),
        ("/generate", {"text": ["a", "%"]}),
        ("/invocations", {"prompt": "%"}),
        ("/encode", {"text": "%"}),
        ("/v1/completions", {"prompt": "%"}),
        ("/v1/completions", {"prompt": ["a", "%"]}),
        ("/v1/embeddings", {"input": "%"}),
        ("/v1/score", {"query": "%", "items": ["b"], "label_token_ids": [7]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "%"}]}),
    ],
)
def test_text_that_is_far_too_long_is_refused_before_it_is_encoded(http, path, body):
    text = "the heron " * 20_000
    whole = json.loads(json.dumps(body).replace("%", text))
    reply = http.post(path, json=whole)
    message = reply.json().get("error", {}).get("message") or reply.json()["message"]
    assert reply.status_code == 400, message
    assert "tokens, expected fewer than the context length" in message
    assert "got at least" in message


def test_text_of_any_length_can_be_counted(http):
    text = "the heron " * 20_000
    assert http.post("/tokenize", json={"prompt": text}).json()["count"] > 20_000
    messages = [{"role": "user", "content": text}]
    assert http.post("/tokenize", json={"messages": messages}).json()["count"] > 20_000


def test_invocations_take_whatever_the_fields_say(http):
    sampling = {"max_tokens": 3, "temperature": 0}
    found = http.post("/invocations", json={"prompt": "a", **sampling}).json()
    assert found["object"] == "text_completion"
    found = http.post("/invocations", json={"messages": MESSAGES, **sampling}).json()
    assert found["object"] == "chat.completion"
    assert (
        "scores"
        in http.post(
            "/invocations", json={"query": "a", "items": ["b"], "label_token_ids": [1]}
        ).json()
    )
    assert "output_ids" in native(http, text="a")
    found = http.post("/invocations", json={"text": "a", "sampling_params": {"max_new_tokens": 2}})
    assert len(found.json()["output_ids"]) <= 2
    assert http.post("/invocations", json={"nothing": 1}).status_code == 400
