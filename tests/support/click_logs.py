"""Tiny folders in the formats of Ali-CCP, KuaiRand-Pure and AliExpress."""

from __future__ import annotations

import numpy as np

from recsys_examples.click_conversion import aliexpress, kuairand

NAMES = ("ali_ccp", "kuairand", "aliexpress")


def write(name, folder, rows=200):
    """Write all files of a log; clicks and conversions depend on the first feature."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    _WRITERS[name](folder, rows, rng)


def _events(feature, rng):
    """Labels that are more likely for odd features."""
    odd = feature % 2
    click = rng.random() < 0.4 + 0.3 * odd
    return int(click), int(click and rng.random() < 0.3 + 0.4 * odd)


def _csv(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(str(row.get(name, 0)) for name in columns) for row in rows]
    path.write_text("\n".join([",".join(columns), *lines]) + "\n")


def _ali_ccp(folder, rows, rng):
    def features(*entries):
        listed = "\x01".join(f"{field}\x02{value}\x031.0" for field, value in entries)
        return f"{len(entries)},{listed}"

    users = range(40)
    for split in ("train", "test"):
        common = [f"u{u},{features(('101', u), ('121', u % 9))}" for u in users]
        skeleton = []
        for i in range(rows):
            user, item = i % len(users), int(rng.integers(30))
            click, conversion = _events(item, rng)
            own = features(("205", item), ("508", item % 5), ("301", 1))
            skeleton.append(f"{i},{click},{conversion},u{user},{own}")
        for name, lines in (("sample_skeleton", skeleton), ("common_features", common)):
            (folder / f"{name}_{split}.csv").write_text("\n".join(lines) + "\n")


def _kuairand(folder, rows, rng):
    users, videos = range(20), range(30)
    columns = ["user_id", *kuairand.USER_BUCKETS, *kuairand.USER_NUMBERS]
    _csv(folder / kuairand.USERS, columns, [{"user_id": u} for u in users])
    columns = ["video_id", *kuairand.VIDEO_BUCKETS]
    _csv(
        folder / kuairand.VIDEOS,
        columns,
        [{"video_id": v, "author_id": v % 7} for v in videos],
    )
    columns = [
        *("user_id", "video_id", "hourmin", "tab", "play_time_ms", "duration_ms"),
        *kuairand.SIGNALS.values(),
    ]
    for name in kuairand.LOGS.values():
        log = []
        for i in range(rows):
            video = int(rng.integers(len(videos)))
            click, like = _events(video, rng)
            log.append(
                {
                    "user_id": i % len(users),
                    "video_id": video,
                    "is_click": click,
                    "is_like": like,
                    "duration_ms": 5000,
                    "hourmin": 1200,
                }
            )
        _csv(folder / name, columns, log)


def _aliexpress(folder, rows, rng):
    columns = [
        aliexpress.GROUP,
        *aliexpress.CATEGORIES,
        *aliexpress.NUMBERS,
        *aliexpress.LABELS,
    ]
    for country in ("NL", "US"):
        for split in ("train", "test"):
            log = []
            for i in range(rows):
                feature = int(rng.integers(10))
                click, conversion = _events(feature, rng)
                log.append(
                    {
                        aliexpress.GROUP: i // 2,
                        "categorical_1": feature,
                        "numerical_1": feature % 2,
                        "click": click,
                        "conversion": conversion,
                    }
                )
            _csv(folder / f"AliExpress_{country}" / f"{split}.csv", columns, log)


_WRITERS = {"ali_ccp": _ali_ccp, "kuairand": _kuairand, "aliexpress": _aliexpress}
