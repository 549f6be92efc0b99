"""The page about experiments, from results by hand: some of them finished, others half done."""

import matplotlib
import matplotlib.pyplot as plt
import pytest

from tools import claims_section, experiments_page

matplotlib.use("svg")

PART = {"device": "a CPU", "versions": {"jax": "0.1"}, "command": "python -m experiments"}
EPOCHS = [
    {
        split: {"loss": loss, "accuracy": accuracy}
        for split, loss, accuracy in (("train", 2.0, 0.25), ("validation", 1.5, 0.5))
    }
]
CLAIMS = PART | {
    "settings": {
        "width_divisor": 8,
        "epochs": 3,
        "batch_size": 64,
        "learning_rate": 0.01,
        "train_images": 45000,
        "test_images": 10000,
        "crop_images": 2000,
    },
    "claims": [
        {
            "claim": "B over A",
            "section": "4.1",
            "kind": "lower",
            "paper": [29.6, 28.7],
            "seeds": [0, 1, 2],
            "before": [0.5, 0.51, 0.52],
            "after": [0.25, 0.25, 0.25],
            "gain": 0.26,
            "interval": [0.2, 0.3],
            "p": 0.0123,
            "outcome": "holds",
        },
        {"claim": "C over B", "section": "4.1", "paper": None, "seeds": [], "outcome": "not run"},
    ],
    "nets": {
        "A": {"0": {"epochs": EPOCHS, "losses": [[1, 2.5], [2, 2.0]], "diverged": False}},
        "D": {"0": {"epochs": [], "losses": [], "diverged": True}},
        "D, normal": {
            "0": {
                "epochs": [EPOCHS[0] | {"train": {"loss": 2.3, "accuracy": 0.1}}],
                "losses": [[1, 2.3]],
                "diverged": False,
            },
            "1": {"epochs": EPOCHS, "losses": [[1, 2.3]], "diverged": False},
        },
        "D, from A": {},
        "D, BN": {},
    },
}
# The second result has the other claim, with two seeds, and one net.
CLAIMS_CPU = PART | {
    "settings": CLAIMS["settings"] | {"epochs": 4},
    "claims": [
        CLAIMS["claims"][0] | {"seeds": [], "outcome": "not run"},
        CLAIMS["claims"][0]
        | {
            "claim": "C over B",
            "seeds": [0, 1],
            "before": [0.5, 0.5],
            "after": [0.25, 0.5],
            "gain": 0.125,
            "interval": None,
            "p": None,
            "outcome": "undecided",
        },
    ],
    "nets": {"A": CLAIMS["nets"]["A"], "D, BN": {}},
}
STEPS = PART | {
    "settings": {"width_divisor": 8},
    "runs": [
        {
            "batch_norm": False,
            "dtype": "float64",
            "learning_rate": 0.01,
            "losses": {"jax": [2.3] * 50, "torch": [2.3] * 50},
            "largest_difference": 1.4e-10,
            "validation_difference": 4.7e-11,
            "bound": 1e-4,
            "within_bound": True,
            "perturbed_difference": 4.6e-3,
            "steps_within_bound": {"torch": 50, "perturbed": 12},
        }
    ],
}
CELL = {"jax": 0.5, "torch": 0.25, "difference": 0.25, "limit": 0.125, "within_noise": False}
BASELINE = PART | {
    "data": "digits",
    "optimizer": "sgd",
    "settings": {
        "width_divisor": 8,
        "train_images": 90,
        "valid_images": 10,
        "epochs": 1,
        "learning_rate": 0.001,
    },
    "runs": [{"framework": "jax", "seed": 0, "epochs": [{"train_loss": 2.0, "valid_loss": 1.5}]}],
    "summary": None,
}
COMPARISON = [dict.fromkeys(("train_loss", "valid_loss", "train_accuracy", "valid_accuracy"), CELL)]


@pytest.fixture
def results(monkeypatch):
    """Results that experiments_page reads, which a test may change."""
    documents = {
        "claims": CLAIMS,
        "claims_cpu": CLAIMS_CPU,
        "parity": {"first_steps_8": STEPS},
        "baseline": {"digits_sgd_8": BASELINE},
        "receptive_field": {},
    }
    for module in (experiments_page, claims_section):
        monkeypatch.setattr(module, "load", documents.__getitem__)
    return documents


def test_page_of_half_done_results(results):
    page = experiments_page.page()
    assert (
        "| B over A | 4.1 | 29.6 → 28.7 | 51.0 ± 1.0 → 25.0 ± 0.0 | +26.0 | 0.012 | 3 | **holds** |"
        in page
    )
    assert (
        "Here 1 of 2 claims hold, 0 fail, and 0 are undecided. Claims that were not run: 1." in page
    )
    assert "and 1 are undecided, of which 1 have fewer than three seeds. Claims that were" in page
    assert "| B over A | 4.1 | +26.0, holds | not run |" in page
    assert "| C over B | 4.1 | not run | +12.5, undecided (2 seeds) |" in page
    assert "needed 1 of the 5 nets" in page
    assert "trains for 3 epochs" in page and "trains for 4 epochs" in page
    assert "Diverged: “D” (1 of 1)." in page
    assert "Learned nothing, with a loss of ln 10: “D, normal” (1 of 2)." in page
    assert "Nets with fewer than three finished seeds: “A” (1).\n" in page
    assert "Nets that were not trained: “D, BN”.\n" in page
    assert "images/claims_cpu_gains.svg" in page
    assert "| A | 2.000 | 25.0 | 50.0 | 1 |" in page
    assert (
        "| without | float64 | 0.01 | 1.4e-10 | 4.7e-11 | 0.0001 | yes | 4.6e-03 | 50 / 12 |"
        in page
    )
    assert "Whole runs" not in page
    plots = experiments_page.plots()
    assert plots["claims_gains"] == [["B over A", [25.0, 26.0, 27.0], [20.0, 30.0], "holds"]]
    assert plots["claims_cpu_gains"] == [["C over B", [25.0, 0.0], None, "undecided"]]
    assert plots["baseline_digits_sgd_8"]["valid"] == {"vgg_jax": [[1.5]], "PyTorch": []}


def test_page_names_what_differs(results):
    results["baseline"] = {"digits_sgd_8": BASELINE | {"summary": COMPARISON}}
    page = experiments_page.page()
    assert "| valid loss | 0.5000 | 0.2500 | +0.2500 | 0.1250 | **no** |" in page


def test_page_of_stacks_and_nets(results):
    field = {"height": 7}
    numbers = {"params": 1, "macs": 2, "receptive_field": field}
    run = {"pair": "three 3x3, one 7x7", "channels": 8, "side": 4}
    run |= {"three 3x3": numbers, "one 7x7": numbers | {"params": 1234}}
    run["ratios"] = {"macs": 1.8148, "forward_seconds": 2.0, "gradients_seconds": 3.0}
    net = {"seed": 0, "params": 1000, "macs": 2000}
    results["receptive_field"] = {
        "layers": PART | {"runs": [run]},
        "nets": PART
        | {
            "settings": {"width_divisor": 8, "epochs": 3, "train_images": 100},
            "runs": [net | {"net": "B"}, net | {"net": "B-5x5", "params": 1500}],
            "summary": {
                "B - B-5x5": {
                    "seeds": [0, 1],
                    "differences": [0.01, 0.03],
                    "p": 0.295,
                    "accuracies": {"B": [0.5, 0.52], "B-5x5": [0.49, 0.49]},
                }
            },
        },
    }
    page = experiments_page.page()
    assert "| three 3x3, one 7x7 | 4x4x8 | 1 → 1,234 | 1.81 | 7 → 7 | 2.00 | 3.00 |" in page
    cells = "B-5x5 → B | 1,500 → 1,000 | 2,000 → 2,000 | 49.0 ± 0.0 → 51.0 ± 1.4 | 2.0 ± 1.4 | 0.29"
    assert f"| {cells} | 2 |" in page


def test_plots_can_be_drawn(results):
    figures = [experiments_page.draw(*item) for item in experiments_page.plots().items()]
    assert all(figure.axes for figure in figures)
    for figure in figures:
        plt.close(figure)
