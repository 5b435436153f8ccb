"""mlx-lm as a contender: the same model as a Hugging Face family, random weights, MLX's optimizer."""

import importlib
import importlib.metadata
from itertools import cycle
from time import perf_counter
from typing import Any

from moezoo.bench.case import Case, Work, random_activations, random_prompts, random_windows
from moezoo.bench.quantized import MAX_LENGTH, quantized_folder
from moezoo.core.huggingface.export_as import family_for


class MlxLmPeer:
    """mlx-lm with the BLAS that was loaded before MLX."""

    def __init__(self, blas: str):
        self._blas = blas
        self._models: list[tuple[Case, Any]] = []

    def facts(self) -> dict[str, str]:
        versions = f"{importlib.metadata.version('mlx-lm')}, MLX {importlib.metadata.version('mlx')}"
        return {"mlx-lm": versions, "blas": self._blas}

    def prepare(self, case: Case) -> Work:
        match case.kind:
            case "train":
                return self._train(case)
            case "forward" | "gradients":
                return self._moe_layer(case)
            case "decode":
                return self._decode(case)

    @staticmethod
    def _model(case: Case) -> Any:
        import mlx.core as mx

        if case.bits:
            from mlx_lm.utils import load_model

            with quantized_folder(case) as folder:
                model, _ = load_model(folder)  # evaluates the weights
            return model
        family, config = family_for(case.spec, max_length=MAX_LENGTH)
        module = importlib.import_module(f"mlx_lm.models.{family.name}")
        mx.random.seed(0)
        model = module.Model(module.ModelArgs.from_dict(config))
        mx.eval(model.parameters())
        return model

    def _train(self, case: Case) -> Work:
        import mlx.core as mx
        from mlx import nn, optimizers
        from mlx.utils import tree_map

        model, config = self._model(case), case.adamw
        model.train()
        optimizer = optimizers.AdamW(
            config.learning_rate,
            [config.beta1, config.beta2],
            config.epsilon,
            config.weight_decay,
            bias_correction=True,
        )
        batches = cycle([mx.array(windows) for windows in random_windows(case)])

        def loss(window: Any) -> Any:
            return nn.losses.cross_entropy(model(window[:, :-1]), window[:, 1:], reduction="mean")

        value_and_gradients = nn.value_and_grad(model, loss)

        def step() -> None:
            parts = next(batches)
            value, gradients = value_and_gradients(parts[0])
            for window in parts[1:]:
                more = value_and_gradients(window)
                value, gradients = value + more[0], tree_map(lambda a, b: a + b, gradients, more[1])
            if len(parts) > 1:
                gradients = tree_map(lambda gradient: gradient / len(parts), gradients)
            if config.clip_norm is not None:
                gradients, _ = optimizers.clip_grad_norm(gradients, config.clip_norm)
            optimizer.update(model, gradients)
            mx.eval(value, model.parameters(), optimizer.state)

        def run(repeats: int) -> float:
            begin = perf_counter()
            for _ in range(repeats):
                step()
            return perf_counter() - begin

        return run

    def _moe_layer(self, case: Case) -> Work:
        import mlx.core as mx
        from mlx.utils import tree_flatten, tree_unflatten

        layer = self._model(case).layers[case.spec.moe_layers[0]]
        (moe,) = [module for module in layer.children().values() if "switch_mlp" in module]
        x, gradient = mx.array(random_activations(case, 3)), mx.array(random_activations(case, 4))
        names, values = zip(*tree_flatten(moe.parameters()), strict=True)

        def output(x: Any, *values: Any) -> Any:
            moe.update(tree_unflatten(list(zip(names, values, strict=True))))
            return [moe(x)]

        def gradients() -> Any:
            result = mx.vjp(output, [x, *values], [gradient])[1]
            moe.update(tree_unflatten(list(zip(names, values, strict=True))))
            return result

        def run(repeats: int) -> float:
            begin = perf_counter()
            for _ in range(repeats):
                mx.eval(moe(x) if case.kind == "forward" else gradients())
            return perf_counter() - begin

        return run

    def _decode(self, case: Case) -> Work:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        same = (model for other, model in self._models if (other.spec, other.bits) == (case.spec, case.bits))
        model = next(same, None)
        if model is None:
            model = self._model(case)
            self._models.append((case, model))
        prompts = mx.array(random_prompts(case))

        def generate_once() -> float:
            """Generate like mlx-lm's `generate_step`: the next step is started before the current token is read."""
            cache = make_prompt_cache(model)
            token = mx.argmax(model(prompts, cache=cache)[:, -1], axis=-1)
            mx.async_eval(token)
            stamps = []
            for index in range(case.new_tokens):
                if index + 1 < case.new_tokens:
                    following = mx.argmax(model(token[:, None], cache=cache)[:, -1], axis=-1)
                    mx.async_eval(following)
                token.tolist()
                stamps.append(perf_counter())
                token = following
            return (stamps[-1] - stamps[0]) / (len(stamps) - 1)

        return lambda repeats: sum(generate_once() for _ in range(repeats))


def make() -> MlxLmPeer:
    """Create the contender with the BLAS of moezoo's MLX backend."""
    from moezoo.mlx_backend import BLAS

    return MlxLmPeer(BLAS)


def make_as_installed() -> MlxLmPeer:
    """Create the contender with the BLAS of MLX's wheel."""
    return MlxLmPeer("as installed")
