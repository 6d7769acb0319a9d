"""C-LoRAE on a small random LLaVA of transformers: python -m docs.other_models"""
import tempfile

import torch
import transformers as tf

import clorae
import losses


def llava():
    """A model of somebody else: random, but the same at every call, and frozen by adapt."""
    torch.manual_seed(0)
    vision = tf.CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                 num_attention_heads=2, image_size=16, patch_size=8)
    text = tf.LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                          num_attention_heads=4, initializer_range=0.2, pad_token_id=0,
                          bos_token_id=1, eos_token_id=2)
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=31)
    return tf.LlavaForConditionalGeneration(config).eval()


def batch(rows=16):
    """Images with one bright quarter, in one of three colours; the prompt asks nothing: whether the
    answer is the colour (ids 10 to 12) or the quarter (20 to 23) is the row's task alone."""
    colour, place = torch.randint(3, (rows,)), torch.randint(4, (rows,))
    images, task = torch.zeros(rows, 3, 2, 2), torch.arange(rows) % 2
    images[torch.arange(rows), colour, place // 2, place % 2] = 3.0
    answer = torch.where(task == 0, 10 + colour, 20 + place)[:, None]
    prompt = torch.tensor([[0, 1, 31, 31, 31, 31, 5]]).repeat(rows, 1)  # left padding, image, word
    return {"input_ids": prompt, "attention_mask": (prompt != 0).long(),
            "pixel_values": images.repeat_interleave(8, 2).repeat_interleave(8, 3)}, answer, task


model = clorae.adapt(llava(), rank=16, tasks=("colour", "quarter"), dropout=0.0,
                     targets=("q_proj", "v_proj"), modules=("language_model",))
layers = clorae.expert_layers(model)
print("wrapped", *layers, sep="\n  ")
adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
for step in range(101):
    inputs, answer, task = batch()
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1)
    labels = torch.where(torch.arange(ids.shape[1]) == ids.shape[1] - 1, ids, -100)
    clorae.keep_outputs(model.train())
    with model.routing.batch(task, memory=mask):
        loss = model(ids, inputs["pixel_values"], mask, labels=labels).loss
        mim = losses.mutual_information(clorae.expert_outputs(model), len(ids), len(layers))
        (loss + 0.01 * mim).backward()
    adam.step(), adam.zero_grad()
    if step % 25 == 0:
        print(f"step {step:3}  cross-entropy {loss.item():.3f}  L_MIM {mim.item():.3f}")

inputs, answer, task = batch(64)
mask = inputs["attention_mask"].bool()
with torch.no_grad(), model.eval().routing.batch(task), clorae.read_gates(model) as gates:
    logits = model(**inputs).logits
means = {path: g[mask].mean(0).tolist() for path, (g,) in gates.items()}
print("mean gates", *(f"{g1:.2f} {g2:.2f}  {path}" for path, (g1, g2) in means.items()), sep="\n  ")

file = f"{tempfile.mkdtemp()}/experts.safetensors"
clorae.save(model, file)
loaded = clorae.load(llava(), file)
with torch.no_grad(), loaded.routing.batch(task):
    print("loaded, equal bit for bit:", torch.equal(loaded(**inputs).logits, logits))


def right(model, rows=slice(None), **how):
    """Share of the rows that generate answers right."""
    some = {name: tensor[rows] for name, tensor in inputs.items()}
    ids = model.generate(**some, max_new_tokens=1, do_sample=False, **how)
    return (ids[:, -1] == answer[rows, 0]).float().mean().item()


with model.routing.batch(task, repeats=3):  # 3 beams make three rows of each
    for how in ({"use_cache": True}, {"use_cache": False}, {"num_beams": 3}):
        print(f"right {right(model, **how):.2f}  {how}")
for n, name in enumerate(("colour", "quarter")):
    merged = clorae.merge(clorae.load(llava(), file), name, means)
    print(f"merged for {name}, gates fixed: right {right(merged, task == n):.2f}")
