"""Images for T5: frozen vision towers, visual tokens, and the UMIE adapter.

In reading order: a Vision Transformer (a "tower") for the hub's ViT and CLIP vision checkpoints;
what it sees of a picture, namely the whole and the crops of its objects; UMIE, which makes visual
tokens of the tower's features and mixes them into T5's encoder output by a gate, or lets T5 read
them before the text. The tower is frozen, so engine/features.py keeps its features on disk.

References: C-LoRAE (arXiv 2505.06303) Fig. 3, its base model UMIE (arXiv 2401.03082), ViT (arXiv
2010.11929), CLIP (arXiv 2103.00020); names and numbers of transformers' ViTModel, CLIPVisionModel.
Shapes: B batch, S source tokens, T target tokens, V visual tokens, D model width, H heads, K head
width, P patches, F image-feature width, C vocabulary; M memory tokens, which the decoder reads.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from engine.files import ImageError, WeightsError, read_json, write_whole
from engine.images import PathLike, to_rgb
from engine.processor import picture_settings
from engine.schema import Box
from engine.weights import load_weights, odd_fields, open_weights
from t5 import (T5, Attention, FeedForward, Linear, RMSNorm, Stack, T5Config, compute_dtype,
                join_heads, prepare_memory, split_heads)

# ------------------------------------------------------------------------------ vision transformer
VIT, CLIP = FAMILIES = ("vit", "clip_vision_model")  # transformers' model_type
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "gelu_new": nn.GELU("tanh"),
               "gelu_pytorch_tanh": nn.GELU("tanh"),
               "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}  # CLIP was trained with this
# What transformers assumes where a CLIP folder's files are silent; ViT's are ViTConfig's own.
CLIP_DEFAULTS = {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
                 "image_mean": (0.48145466, 0.4578275, 0.40821073),
                 "image_std": (0.26862954, 0.26130258, 0.27577711), "resample": 3}


@dataclass
class ViTConfig:
    """Geometry under transformers' field names, and how pictures become pixels."""
    model_type: str = VIT
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    image_mean: Sequence[float] = (0.5, 0.5, 0.5)
    image_std: Sequence[float] = (0.5, 0.5, 0.5)
    resample: int = 2  # Pillow's number for bilinear

    def __post_init__(self) -> None:
        def triple(value: object, least: float) -> bool:
            return (isinstance(value, (list, tuple)) and len(value) == 3
                    and all(type(x) in (int, float) and least <= x < 10 for x in value))

        odd = odd_fields(self, resample=(0, 5))
        fits = {"model_type": self.model_type in FAMILIES,
                "hidden_act": self.hidden_act in list(ACTIVATIONS),
                "image_mean": triple(self.image_mean, -10),
                "image_std": triple(self.image_std, 1e-6),
                "num_attention_heads": odd or self.hidden_size % self.num_attention_heads == 0,
                "patch_size": odd or self.patch_size <= self.image_size}
        odd += [f"{name} = {getattr(self, name)!r}" for name in fits if not fits[name]]
        if odd:
            raise WeightsError(f"expected model_type of {FAMILIES}, hidden_act of "
                               f"{[*ACTIVATIONS]}, sane sizes, 3 means and spreads; got "
                               f"{', '.join(odd)}; use a ViT or CLIP vision checkpoint's own")

    @classmethod
    def from_pretrained(cls, folder: PathLike) -> "ViTConfig":
        """Read config.json (of a whole CLIP its vision part) and how pictures become pixels."""
        path = Path(folder) / "config.json"
        raw = read_json(path)
        if "vision_config" in raw:
            if not isinstance(raw["vision_config"], dict):
                raise WeightsError(f"{path}: expected vision_config as an object, got "
                                   f"{raw['vision_config']!r}; fetch the file anew")
            raw = raw["vision_config"] | {"model_type": CLIP}
        raw |= picture_settings(Path(folder), raw.get("image_size", cls.image_size))
        if raw.setdefault("model_type", None) == CLIP:  # a file that does not name one is refused
            raw = CLIP_DEFAULTS | raw
        try:
            return cls(**{k: v for k, v in raw.items() if k in cls.__dataclass_fields__})
        except WeightsError as error:
            raise WeightsError(f"{folder}: {error}") from None


class ViTBlock(nn.Module):
    """Pre-norm transformer layer: x + Attention(LN x), then x + MLP(LN x)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.heads, self.activation = config.num_attention_heads, ACTIVATIONS[config.hidden_act]
        self.attention_norm = nn.LayerNorm(D, eps)
        self.q, self.k, self.v = (nn.Linear(D, D, config.qkv_bias) for _ in range(3))
        self.o = nn.Linear(D, D)
        self.mlp_norm = nn.LayerNorm(D, eps)
        self.up = nn.Linear(D, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, D)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,1+P,F] -> [B,1+P,F]."""
        y = self.attention_norm(x)
        q, k, v = (split_heads(layer(y), self.heads) for layer in (self.q, self.k, self.v))
        x = x + self.o(join_heads(F.scaled_dot_product_attention(q, k, v)))
        return x + self.down(self.activation(self.up(self.mlp_norm(x))))


class ViT(nn.Module):
    """A tower up to transformers' `last_hidden_state`; ViT(config) draws ViT's initialisation.

    CLIP differs in three places: no bias in the patch projection, a norm before the first layer,
    none after the last (its post_layernorm touches only the pooled token, not used here)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        clip, D, patch = config.model_type == CLIP, config.hidden_size, config.patch_size
        self.config, self.size = config, config.image_size
        self.preprocessing = (config.image_size, tuple(config.image_mean), tuple(config.image_std),
                              config.resample)  # what `preprocess` is given besides the picture
        tokens = 1 + (config.image_size // patch) ** 2
        # Shapes as in the files, which differ between the families by leading ones.
        self.class_token = nn.Parameter(torch.empty((D,) if clip else (1, 1, D)))
        self.positions = nn.Parameter(torch.empty((tokens, D) if clip else (1, tokens, D)))
        self.patches = nn.Conv2d(3, D, patch, stride=patch, bias=not clip)
        self.first_norm = nn.LayerNorm(D, config.layer_norm_eps) if clip else nn.Identity()
        self.blocks = nn.Sequential(*(ViTBlock(config) for _ in range(config.num_hidden_layers)))
        self.final_norm = nn.Identity() if clip else nn.LayerNorm(D, config.layer_norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 or name == "class_token":
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B,3,size,size] -> [B,1+P,F]; token 0 stands for the whole picture."""
        if pixel_values.shape[1:] != (3, self.size, self.size):
            raise ImageError(f"ViT: expected pixels [B, 3, {self.size}, {self.size}], got "
                             f"{list(pixel_values.shape)}; use preprocess(image, {self.size})")
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)  # [B,P,F]
        x = torch.cat((self.class_token.expand(len(x), 1, -1), x), dim=1) + self.positions
        return self.final_norm(self.blocks(self.first_norm(x)))

    def views(self, image: Image.Image, boxes: Sequence[Box]) -> tuple[Tensor, Tensor]:
        """A picture and n boxes in it -> pixels [1+n,3,size,size] of the picture and its crops,
        and the normalised boxes [1+n,5] of both; ImageError for a bad box."""
        normalised = normalise_boxes(boxes, image.size)
        views = [image, *(crop(image, box) for box in boxes)]
        return torch.stack([preprocess(view, *self.preprocessing) for view in views]), normalised

    @staticmethod
    def feature_width(folder: PathLike) -> int:
        """F of the tower in an HF directory, from its config.json alone."""
        return ViTConfig.from_pretrained(folder).hidden_size

    @classmethod
    def from_pretrained(cls, folder: PathLike) -> "ViT":
        """HF directory -> tower in float32 and eval mode; WeightsError for a key that is neither
        the tower's nor one of DROPS."""
        with torch.device("meta"):
            model = cls(ViTConfig.from_pretrained(folder))
        stored, family = open_weights(Path(folder)), model.config.model_type
        prefix = PREFIXES[family] if any(k.startswith(PREFIXES[family]) for k in stored) else ""
        names = {ours: prefix + hub for ours, hub in hub_names(model).items()}
        drop = {key for key in stored if key.removeprefix(prefix).startswith(DROPS[family])}
        load_weights(Path(folder), stored, model, names, drop, torch.float32)
        return model.eval()

    def save_pretrained(self, folder: PathLike) -> None:
        """Write model.safetensors, config.json and preprocessor_config.json as of a ViTModel."""
        if self.config.model_type != VIT:
            raise WeightsError(f"{folder}: only model_type vit is written, got "
                               f"{self.config.model_type}; copy the original checkpoint instead")
        folder, names, config = Path(folder), hub_names(self), asdict(self.config)
        pictures = {k: config.pop(k) for k in ("image_mean", "image_std", "resample")}
        pictures |= {"image_processor_type": "ViTImageProcessor",
                     "size": {"height": self.size, "width": self.size}}
        tensors = {names[ours]: tensor.contiguous() for ours, tensor in self.state_dict().items()}
        write_whole(folder / "model.safetensors", save(tensors, {"format": "pt"}))
        write_whole(folder / "preprocessor_config.json", json.dumps(pictures, indent=2).encode())
        write_whole(folder / "config.json", json.dumps(config, indent=2).encode())


# What the keys of a ViTModel and of a CLIPVisionModel say in place of our words; None: it lacks it.
HUB_WORDS = {
    "class_token": ("embeddings.cls_token", "embeddings.class_embedding"),
    "positions": ("embeddings.position_embeddings", "embeddings.position_embedding.weight"),
    "patches.": ("embeddings.patch_embeddings.projection.", "embeddings.patch_embedding."),
    "first_norm.": (None, "pre_layrnorm."),  # spelt so in every CLIP file
    "blocks.": ("encoder.layer.", "encoder.layers."),
    ".attention_norm.": (".layernorm_before.", ".layer_norm1."),
    ".q.": (".attention.attention.query.", ".self_attn.q_proj."),
    ".k.": (".attention.attention.key.", ".self_attn.k_proj."),
    ".v.": (".attention.attention.value.", ".self_attn.v_proj."),
    ".o.": (".attention.output.dense.", ".self_attn.out_proj."),
    ".mlp_norm.": (".layernorm_after.", ".layer_norm2."),
    ".up.": (".intermediate.dense.", ".mlp.fc1."),
    ".down.": (".output.dense.", ".mlp.fc2."),
    "final_norm.": ("layernorm.", None)}
PREFIXES = {VIT: "vit.", CLIP: "vision_model."}  # of all keys, in files that hold more than a tower
DROPS = {  # keys that are not read: heads, poolers, CLIP's text half, buffers
    VIT: ("pooler.", "classifier.", "decoder.", "embeddings.mask_token"),
    CLIP: ("post_layernorm.", "embeddings.position_ids", "text_model.", "text_projection.",
           "visual_projection.", "logit_scale", "classifier.")}


def hub_names(model: ViT) -> dict[str, str]:
    """Our parameter names -> the hub's (without prefix), one to one."""
    column, names = FAMILIES.index(model.config.model_type), dict.fromkeys(model.state_dict())
    for ours in names:
        theirs = ours
        for word, hub in HUB_WORDS.items():
            theirs = theirs.replace(word, hub[column] or "")
        names[ours] = theirs
    return names


# ------------------------------------------------------------------------------ what a tower sees
def preprocess(image: Image.Image, size: int = 224, mean: float | Sequence[float] = 0.5,
               std: float | Sequence[float] = 0.5, resample: int = 2) -> Tensor:
    """Picture -> pixels [3,size,size] float32, equal to the hub's ViTImageProcessor.

    The picture is squeezed into a square and never cut, since a box may lie anywhere in it; this
    holds for CLIP towers too, whose own processor would cut out the centre."""
    pixels = np.asarray(to_rgb(image).resize((size, size), resample), dtype=np.float32) / 255
    pixels = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def normalise_boxes(boxes: Sequence[Box], size: Sequence[int]) -> Tensor:
    """Pixel boxes (x1, y1, x2, y2) of a picture -> [1+n,5], row 0 the picture itself.

    Rows are x1, y1, x2, y2, area in 0..1. Corners up to one pixel outside (annotators round) are
    pulled in; any other box that is not inside the picture is an ImageError."""
    (w, h), rows = size, [(0.0, 0.0, 1.0, 1.0, 1.0)]
    for box in boxes:
        x1, y1, x2, y2 = box if len(box) == 4 else [math.nan] * 4
        if not (-1 <= x1 <= x2 <= w + 1 and -1 <= y1 <= y2 <= h + 1):  # not so for NaN either
            raise ImageError(f"box {list(box)}: expected x1 <= x2 in 0..{w} and y1 <= y2 in 0..{h} "
                             "pixels; correct the record's objects or its size")
        x1, x2 = (min(max(x, 0), w) / w for x in (x1, x2))
        y1, y2 = (min(max(y, 0), h) / h for y in (y1, y2))
        rows.append((x1, y1, x2, y2, (x2 - x1) * (y2 - y1)))
    return torch.tensor(rows)


def crop(image: Image.Image, box: Box) -> Image.Image:
    """All pixels that a box touches, at least one: a thinner box gives the pixel it lies in."""
    left, top = (min(max(int(x), 0), n - 1) for x, n in zip(box[:2], image.size))
    right, bottom = (min(math.ceil(x), n) for x, n in zip(box[2:], image.size))
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


# ------------------------------------------------------------------------------ the UMIE adapter
class VisualEmbedding(nn.Module):
    """A visual token = LN(Linear(feature)) + LN(Linear(x1, y1, x2, y2, area)) + order embedding."""

    def __init__(self, feature_width: int, config: T5Config, max_objects: int) -> None:
        super().__init__()
        D, eps = config.d_model, config.layer_norm_epsilon
        self.feature, self.feature_norm = nn.Linear(feature_width, D), RMSNorm(D, eps)
        self.box, self.box_norm = nn.Linear(5, D), RMSNorm(D, eps)
        self.order = nn.Embedding(1 + max_objects, D)  # 0: the whole picture, k: its k-th object

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        """features [B,V,F], boxes [B,V,5] -> [B,V,D]."""
        V, dtype = features.shape[1], self.feature.weight.dtype
        if V > self.order.num_embeddings:
            raise ImageError(f"visual tokens: expected at most 1 + {self.order.num_embeddings - 1} "
                             f"objects, got {V} tokens; raise max_objects or keep fewer boxes")
        return (self.feature_norm(self.feature(features.to(dtype)))
                + self.box_norm(self.box(boxes.to(dtype))) + self.order.weight[:V])


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """x [B,S,D], mask [B,S] -> mean over real tokens [B,D], at least float32; 0 where none is."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~mask[..., None], 0.0)
    return x.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class GateFusion(nn.Module):
    """h' = h + lambda FF(LN(h + CrossAttention(LN h, visual))), FF being T5's gated feed-forward.
    The last projection of FF starts at zero: at first h' = h, and the pretrained T5 is intact."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        config = replace(config, feed_forward_proj="gated-gelu")
        D, eps = config.d_model, config.layer_norm_epsilon
        self.attention_norm, self.attention = RMSNorm(D, eps), Attention(config)
        self.feed_forward_norm, self.feed_forward = RMSNorm(D, eps), FeedForward(config)
        nn.init.zeros_(self.feed_forward.down.weight)
        self.proj_text, self.proj_visual = (
            nn.Sequential(Linear(D, 384, D ** -0.5), Linear(384, 128, 384 ** -0.5))
            for _ in range(2))

    def cosine(self, h: Tensor, mask: Tensor, visual: Tensor, visual_mask: Tensor) -> Tensor:
        """The cosine [B] of projected text h [B,S,D] and visual tokens [B,V,D], each first averaged
        over real tokens: the projections are linear, and one vector is cheaper than S."""
        text, image = masked_mean(h, mask), masked_mean(visual, visual_mask)
        precise, dtype = text.dtype, self.proj_text[0].weight.dtype
        return F.cosine_similarity(self.proj_text(text.to(dtype)).to(precise),
                                   self.proj_visual(image.to(dtype)).to(precise), dim=-1)

    def gate(self, h: Tensor, mask: Tensor, visual: Tensor, visual_mask: Tensor) -> Tensor:
        """lambda [B] as in UMIE's code: exp(0.5) cosine through two leaky_relu of slope 0.01."""
        cosine = self.cosine(h, mask, visual, visual_mask)
        return F.leaky_relu(F.leaky_relu(math.exp(0.5) * cosine))

    def forward(self, h: Tensor, mask: Tensor, visual: Tensor, visual_mask: Tensor) -> Tensor:
        """h [B,S,D], mask [B,S], visual [B,V,D], visual_mask [B,V] -> h' [B,S,D]. A row without
        visual tokens is returned unchanged, bit for bit."""
        memory, bias = prepare_memory(visual, visual_mask, compute_dtype(h))
        x = h + self.attention(self.attention_norm(h), memory, bias)
        mixed = self.feed_forward(self.feed_forward_norm(x))
        fused = h + self.gate(h, mask, visual, visual_mask)[:, None, None] * mixed
        return torch.where(visual_mask.any(1)[:, None, None], fused.to(h.dtype), h)


class UMIE(nn.Module):
    """T5 with visual tokens, Eq. (1). These first pass VStack, two T5 encoder layers of their own.

    fusion "gate": UMIE's GateFusion after the text encoder, M = S. fusion "concat", as in the
    paper's Fig. 3: the encoder reads visual tokens before the text, M = V + S. A T5 in bfloat16
    needs autocast, as the visual modules are float32.

    A batch is a data.Batch, or anything with its input_ids, attention_mask [B,S], labels [B,T] or
    None, tasks [B], features [B,V,F], boxes [B,V,5] and visual_mask [B,V]. V may be 0.
    `routing` (set by clorae.adapt) hands each row's task on to the expert layers."""

    def __init__(self, t5: T5, feature_width: int, max_objects: int = 16,
                 fusion: str = "gate") -> None:
        super().__init__()
        if fusion not in ("gate", "concat"):
            raise ValueError(f"UMIE: expected fusion gate or concat, got {fusion!r}; choose one")
        self.t5, self.routing = t5, None
        self.visual_embedding = VisualEmbedding(feature_width, t5.config, max_objects)
        self.vstack = Stack(t5.config, 2, decoder=False)
        self.fusion = GateFusion(t5.config) if fusion == "gate" else None

    def free_adapter(self, policy: str) -> None:
        """Choose what learns besides the experts: --visual-policy.

        train: all visual modules, also the linears that experts wrap in VStack. paper: the visual
        embedding alone. frozen: nothing. docs/decisions.md says what speaks for each."""
        trained = {"train": ("visual_embedding.", "vstack.", "fusion."),
                   "paper": ("visual_embedding.",), "frozen": ()}[policy]
        for name, parameter in self.named_parameters():
            if name.startswith(trained):
                parameter.requires_grad_(True)

    def encode(self, batch: Any) -> tuple[Tensor, Tensor]:
        """-> memory [B,M,D] for the decoder and its mask [B,M]."""
        mask = memory_mask = batch.attention_mask.bool()
        visual_mask = batch.visual_mask.bool()
        if self.fusion is None:  # visual padding comes first, so that image and text are neighbours
            order = visual_mask.long().argsort(dim=1, stable=True)  # [B,V]
            memory_mask = torch.cat((visual_mask.gather(1, order), mask), dim=1)
        if self.routing is not None:
            target = None if batch.labels is None else batch.labels != -100
            self.routing.set(batch.tasks, memory=memory_mask, target=target, visual=visual_mask)
        if batch.features.shape[1] == 0:
            return self.t5.encode(batch.input_ids, mask), mask
        visual = self.vstack(self.visual_embedding(batch.features, batch.boxes), visual_mask)
        if self.fusion is not None:
            h = self.t5.encode(batch.input_ids, mask)
            return self.fusion(h, mask, visual, visual_mask), mask
        text = self.t5.shared(batch.input_ids)
        visual = visual.gather(1, order[..., None].expand_as(visual))
        embeds = torch.cat((visual.to(text.dtype), text), dim=1)
        return self.t5.encode(None, memory_mask, inputs_embeds=embeds), memory_mask

    @torch.no_grad()
    def open_gate(self, batch: Any) -> None:
        """Flip the sign of fresh projections if the cosine is negative on average over a batch.

        To be called once, before training. Two leaky_relu make a negative lambda 1e-4 times as
        small, and the feed-forward then learns to want it still more negative: a gate that starts
        there stays shut. Either sign is an equally likely draw of the initialisation."""
        inputs = []  # of the fusion, which does not run where V = 0
        hook = self.fusion.register_forward_pre_hook(lambda _, args: inputs.append(args))
        self.encode(batch)
        hook.remove()
        for h, mask, visual, visual_mask in inputs:
            cosine = self.fusion.cosine(h, mask, visual, visual_mask)
            if cosine[visual_mask.any(1)].sum() < 0:
                self.fusion.proj_visual[1].weight.neg_()

    def hidden(self, batch: Any) -> Tensor:
        """-> the decoder's hidden states [B,T,D] for batch.labels, before the head."""
        memory, mask = self.encode(batch)
        return self.t5.decode_hidden(self.t5.shift_right(batch.labels), memory, mask,
                                     batch.labels != -100)

    def forward(self, batch: Any) -> Tensor:
        """-> logits [B,T,C] for batch.labels."""
        return self.t5.head(self.hidden(batch))

    def generate(self, batch: Any, max_new_tokens: int, num_beams: int = 1,
                 banned_ids: list[int] | None = None) -> Tensor:
        """-> ids [B,<=max_new_tokens], as T5.generate."""
        with torch.no_grad():
            memory, mask = self.encode(batch)
        on_rows = None if self.routing is None else self.routing.rows
        return self.t5.generate(attention_mask=mask, max_new_tokens=max_new_tokens, memory=memory,
                                num_beams=num_beams, banned_ids=banned_ids, on_rows=on_rows)
