"""Use a patch in plain diffusers; this package is not needed.

    python examples/plain_diffusers.py PIPELINE van-gogh-patch --prompt "a painting by Van Gogh"

PIPELINE is a folder or hub id of any pipeline of diffusers, the one that the patch was made for.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("pipeline")
parser.add_argument("patch")
parser.add_argument("--prompt", default="A painting in the style of Van Gogh")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--guidance-scale", type=float, default=5.0)
parser.add_argument("--out", default="patched.png")
arguments = parser.parse_args()

pipe = DiffusionPipeline.from_pretrained(arguments.pipeline, torch_dtype=torch.float32)
pipe.load_lora_weights(arguments.patch)
image = pipe(
    arguments.prompt,
    num_inference_steps=arguments.steps,
    guidance_scale=arguments.guidance_scale,
    generator=torch.Generator().manual_seed(arguments.seed),
).images[0]
image.save(arguments.out)
print(f"picture: {arguments.out}")
