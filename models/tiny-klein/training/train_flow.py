"""Step 3: rectified flow, the text encoder trained along: the base model.

python models/tiny-klein/training/train_flow.py WORK [--resume]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import CONFIG, Average, Log, learning_rate, set_learning_rate
from flow import Flow, Pool, text_ids, training_positions


def main() -> None:
    parser = argparse.ArgumentParser(description="train the base model")
    parser.add_argument("work", type=Path, help="folder with the pool")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    arguments = parser.parse_args()
    work, config = arguments.work, CONFIG["flow"]
    torch.manual_seed(CONFIG["seed"])
    pool = Pool(work, CONFIG["seed"] + 20)
    flow = Flow(pool.tokenizer.get_vocab_size(), pool.latents.shape[-1]).train()
    optimizer = torch.optim.AdamW(flow.parameters(), betas=(0.9, 0.97), weight_decay=0.01)
    average = Average({"flow": flow}, config["average"])
    start = 0
    if arguments.resume:
        saved = torch.load(work / "flow.pt")
        flow.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        average.state, average.steps, start = saved["average"], saved["step"], saved["step"]
        pool.rng = np.random.default_rng(CONFIG["seed"] + 20 + start)
    log = Log(work / "flow.jsonl")
    print(f"{sum(p.numel() for p in flow.transformer.parameters()) / 1e6:.2f} M parameters in the transformer")

    mean_loss = None
    for step in range(start, config["steps"]):
        set_learning_rate(optimizer, learning_rate(step, config["steps"], config["learning_rate"], 300))
        batch = pool.batch(config["batch"], config["caption_dropout"])
        # Mostly noisy: that is where it is decided what there is and where, and where the four steps lie.
        sigma = torch.sigmoid(1.3 + 1.3 * torch.randn(config["batch"]))
        noise = torch.randn_like(batch.target)
        noisy = torch.lerp(batch.target, noise, sigma[:, None, None])
        positions = text_ids(training_positions(batch.mask, pool.rng))
        velocity = flow.velocity(noisy, sigma, flow.encode(batch.ids, batch.mask), batch.references, positions)
        loss = (velocity - (noise - batch.target)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        average.update()
        mean_loss = loss.item() if mean_loss is None else 0.98 * mean_loss + 0.02 * loss.item()
        if step % 50 == 49:
            log.write(step=step + 1, loss=mean_loss)
        if step % 500 == 499 or step + 1 == config["steps"]:
            state = {"weights": flow.state_dict(), "optimizer": optimizer.state_dict(), "average": average.state}
            torch.save({**state, "step": step + 1}, work / "flow.tmp")
            (work / "flow.tmp").replace(work / "flow.pt")


if __name__ == "__main__":
    main()
