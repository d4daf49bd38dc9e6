//! What `ocifs status` shows: the link, waits, and what was fetched and used of each layer.

use std::time::Duration;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Ocifs, eventually};
use crate::common::registry::TestRegistry;

const FILE: usize = 4 << 20;
const RTT: Duration = Duration::from_millis(30);

#[test]
fn laziness_can_be_seen() {
    let registry = TestRegistry::start();
    registry.latency(RTT);
    let layers = [("a", 1), ("b", 2)].map(|(name, seed)| {
        let tar = Tar::new().file(name, noise(seed, FILE)).file("end", noise(9, FILE));
        Blob::gzip(&tar.finish())
    });
    push(&registry, "app", "1", &layers);
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::knowing(&image);
    let mount = ocifs.mount_with(&image, &["--wait", "ready", "--prefetch", "none"]);
    let status = || mount.status();
    assert_eq!(
        (&status()["fetched"], &status()["used"], &status()["reads"]["waiting"]),
        (&0.into(), &0.into(), &0.into())
    );

    // The status counts a read while it waits.
    registry.hold(&layers[0].path());
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| mount.read("a"));
        eventually("a read waits", || {
            let status = status();
            status["reads"]["waiting"].as_u64() > Some(0) && status["in_flight"]["demand"].as_u64() > Some(0)
        });
        registry.release();
        assert!(reader.join().unwrap() == noise(1, FILE));
    });

    let seen = status();
    let number = |value: &serde_json::Value| value.as_f64().unwrap_or_else(|| panic!("{value} in {seen}"));
    // A new connection takes two round trips to its first answer. Only one of them is delayed here.
    assert!(number(&seen["link"]["rtt"]) >= RTT.as_secs_f64() / 2.0);
    // There may be too few bytes to measure the bandwidth.
    let bandwidth = seen["link"].get("bandwidth").expect("it is said");
    assert!(bandwidth.is_null() || number(bandwidth) > 0.0);
    let reads = &seen["reads"];
    assert_eq!(reads["waiting"], 0);
    assert!(number(&reads["waited"]) > 0.0);
    assert!(number(&reads["waited_p99"]) >= number(&reads["waited_p50"]));
    assert!(number(&reads["waited_p99"]) >= RTT.as_secs_f64());
    assert!(number(&reads["p99"]) >= number(&reads["p50"]));
    let (read, other) = (&seen["layers"][0], &seen["layers"][1]);
    let size = number(&read["size"]);
    assert!(number(&read["used"]) >= size / 2.0 && number(&read["used"]) <= number(&read["fetched"]) + 1.0);
    assert!(number(&read["fetched"]) <= size + 64.0 && number(&read["local"]) <= number(&read["fetched"]));
    assert!(number(&read["misses"]) > 0.0 && number(&read["requests"]) > 0.0);
    assert_eq!(
        (&other["used"], &other["fetched"], &other["misses"]),
        (&0.into(), &0.into(), &0.into())
    );

    // The status without `--json` shows the same values as text.
    let said = ocifs.ok(["status", mount.path().to_str().unwrap()]);
    let text = said.text();
    for line in [
        "fetched ",
        "local ",
        "prefetch ",
        "requests ",
        "link ",
        "reads ",
        "waits ",
        "LAYER ",
    ] {
        assert!(text.lines().any(|l| l.starts_with(line)), "{line}: {text}");
    }
}
