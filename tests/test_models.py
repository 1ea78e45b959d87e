"""Whole networks: sizes as published, generation from the state, samples, images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixers import registry
from mixers.models import ImageClassifier, LanguageModel
from mixers.sampling import Sampling

VOCABULARY = 23


def model(seed: int = 0, **options: Any) -> LanguageModel:
    torch.manual_seed(seed)
    options = {"vocabulary": VOCABULARY, "dim": 16, "layers": ["hgrn", "hgrn"], **options}
    made = LanguageModel(**options)
    # far from the start, where nearly every token is as likely as any other
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def prompts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("vocabulary, count", [(50_265, 46_248_448), (50_272, 46_252_032)])
def test_the_papers_language_model_has_46_25_million_parameters(vocabulary: int, count: int) -> None:
    with torch.device("meta"):
        network = LanguageModel(vocabulary, 512, ["hgrn"] * 6, glu_activation="identity", dropout=0.1)
    assert parameters(network) == count
    assert round(count / 1e6, 2) == 46.25


@pytest.mark.parametrize("dim, count", [(192, 6_107_944), (384, 23_716_456)])
def test_the_papers_image_models_have_6_1_and_23_7_million_parameters(dim: int, count: int) -> None:
    with torch.device("meta"):
        network = ImageClassifier(224, 14, dim, ["hgrn"] * 12, 1000)
    assert parameters(network) == count


@pytest.mark.parametrize("name", [n for n in registry.names() if registry.get(n)(16).causal])
def test_packed_prompts_of_unequal_length_continue_as_each_does_alone(name: str) -> None:
    network = model(layers=[name, name])
    together = network.generate(prompts(7, 1, 70, 3), 12, temperature=0)
    alone = [network.generate([prompt], 12, temperature=0) for prompt in prompts(7, 1, 70, 3)]
    assert together.shape == (4, 12)
    assert torch.equal(together, torch.cat(alone))


def test_greedy_generation_is_what_the_whole_text_predicts() -> None:
    network = model().eval()
    prompt = prompts(9)[0]
    text = prompt[None]
    for _ in range(6):
        text = torch.cat([text, network(text)[0][:, -1].argmax(-1)[:, None]], 1)
    assert torch.equal(network.generate([prompt], 6, temperature=0), text[:, 9:])


def test_one_seed_gives_one_text_whatever_the_global_random_state() -> None:
    network = model()
    first = network.generate(prompts(4, 6), 40, seed=3)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(network.generate(prompts(4, 6), 40, seed=3), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(network.generate(prompts(4, 6), 40, seed=4), first)


def test_generation_leaves_mode_and_gradients_as_they_were_and_uses_no_dropout() -> None:
    network = model(dropout=0.5).train()
    stream = network.stream(prompts(5), temperature=0)
    next(stream)
    # between two tokens gradients are on
    assert torch.is_grad_enabled()
    stream.close()
    assert network.training
    first = network.generate(prompts(5), 30, temperature=0)
    assert torch.equal(first, network.generate(prompts(5), 30, temperature=0))
    assert not first.requires_grad


def test_a_model_without_memory_gets_initial_values() -> None:
    options = {"vocabulary": VOCABULARY, "dim": 16, "layers": ["hgrn", "attention"]}
    torch.manual_seed(0)
    expected = LanguageModel(**options)
    with torch.device("meta"):
        made = LanguageModel(**options)
    made.to_empty(device="cpu")
    torch.manual_seed(0)
    made.reset_parameters()
    torch.testing.assert_close(made.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_no_steps_give_no_tokens() -> None:
    assert model().generate(prompts(3, 4), 0).shape == (2, 0)


def test_a_state_continues_a_text() -> None:
    network = model().eval()
    tokens = torch.stack(prompts(12, 12))
    whole, _ = network(tokens)
    head, state = network(tokens[:, :5])
    tail, _ = network(tokens[:, 5:], state)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole)


def test_an_untied_head_has_weights_of_its_own_and_scaling_is_optional() -> None:
    tied, untied = model(), model(tied=False)
    assert parameters(untied) - parameters(tied) == VOCABULARY * 16 + VOCABULARY
    tokens = torch.stack(prompts(6))
    plain = model(scale_embedding=False).eval()
    plain.embedding.weight.data *= 4
    plain.logits = tied.logits  # type: ignore[method-assign]
    torch.testing.assert_close(plain(tokens)[0], tied.eval()(tokens)[0])


LOGITS = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.15, 0.05, 0.1, 0.7]]).log()


def sampling(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Sampling:
    return Sampling(temperature, top_k, top_p, torch.device("cpu"), seed=0)


@pytest.mark.parametrize(
    "options, left",
    [
        ({}, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        ({"top_k": 1}, [[1, 0, 0, 0], [0, 0, 0, 1]]),
        ({"top_k": 2}, [[1, 1, 0, 0], [1, 0, 0, 1]]),
        ({"top_k": 9}, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        ({"top_p": 1e-9}, [[1, 0, 0, 0], [0, 0, 0, 1]]),
        ({"top_p": 0.39}, [[1, 0, 0, 0], [0, 0, 0, 1]]),
        ({"top_p": 0.41}, [[1, 1, 0, 0], [0, 0, 0, 1]]),
        ({"top_p": 0.75}, [[1, 1, 1, 0], [1, 0, 0, 1]]),
        # among the three that top_k leaves, the first has 0.4 of 0.9
        ({"top_k": 3, "top_p": 0.43}, [[1, 0, 0, 0], [0, 0, 0, 1]]),
    ],
)
def test_top_k_and_top_p_leave_the_likeliest(options: dict[str, Any], left: list[list[int]]) -> None:
    allowed = sampling(**options).allowed(LOGITS)
    assert allowed.isfinite().int().tolist() == left
    assert torch.equal(allowed[allowed.isfinite()], LOGITS[allowed.isfinite()])


def test_top_k_among_equals_leaves_k() -> None:
    assert sampling(top_k=3).allowed(torch.zeros(2, 8)).isfinite().sum(-1).tolist() == [3, 3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_drawn_frequencies_are_the_models_at_that_temperature(temperature: float) -> None:
    drawn = sampling(temperature).draw(LOGITS[:1].expand(40_000, -1))
    frequency = torch.bincount(drawn, minlength=4) / 40_000
    # four standard deviations of a frequency at p = 1/2
    torch.testing.assert_close(frequency, (LOGITS[0] / temperature).softmax(-1), atol=0.01, rtol=0)


def test_a_temperature_near_zero_is_greedy() -> None:
    assert sampling(1e-3).draw(LOGITS).tolist() == sampling(0).draw(LOGITS).tolist() == [0, 3]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompts": []}, "at least one"),
        ({"prompts": [torch.tensor([1]), torch.tensor([], dtype=torch.int64)]}, r"prompt 1 has shape \[0\]"),
        ({"prompts": [torch.tensor([[1, 2]])]}, r"prompt 0 has shape \[1, 2\]"),
        ({"prompts": torch.tensor([[1, 2]])}, "list"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"steps": -1}, "steps is -1"),
    ],
)
def test_wrong_calls_of_generate(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model().generate(**{"prompts": prompts(3), "steps": 0, **arguments})


def test_prompts_of_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match="prompt 0 is a list, expected a tensor"):
        model().generate([[1, 2]], 1)  # type: ignore[list-item]


def test_wrong_tokens_and_wrong_models() -> None:
    with pytest.raises(TypeError, match=r"tokens are torch\.float32"):
        model()(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"tokens have 1 axes \[3\]"):
        model()(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="see the future"):
        model(options={"hgrn": {"bidirectional": True}})
    with pytest.raises(ValueError, match="vocabulary is 0"):
        model(vocabulary=0)
    with pytest.raises(ValueError, match="size 30 is no multiple of patch 4"):
        ImageClassifier(30, 4, 8, ["hgrn"], 10)


def test_an_image_is_seen_from_both_sides() -> None:
    torch.manual_seed(0)
    network = ImageClassifier(8, 2, 12, ["hgrn", "attention", "mingru"], 5, channels=1)
    images = torch.randn(3, 1, 8, 8, requires_grad=True)
    logits = network(images)
    assert logits.shape == (3, 5)
    assert not network.stack.causal
    # each image alone gives what it gives in the batch, and all of it counts
    torch.testing.assert_close(network(images[1:2]), logits[1:2])
    (gradient,) = torch.autograd.grad(logits[0].sum(), images)
    assert (gradient[0] != 0).all()
    with pytest.raises(ValueError, match=r"images are \[3, 1, 8, 9\]"):
        network(torch.randn(3, 1, 8, 9))


def test_patches_are_cut_in_raster_order() -> None:
    network = ImageClassifier(4, 2, 4, ["hgrn"], 2, channels=1)
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    seen: list[Tensor] = []
    network.embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(image)
    assert seen[0][0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
