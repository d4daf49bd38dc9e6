//! Servers that answer requests for parts of a layer with something else than the parts.

use std::time::{Duration, Instant};

use super::{FILE, Scene, good};
use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Ocifs, eventually};
use crate::common::registry::{Fault, TestRegistry};

#[test]
fn a_registry_without_ranges_is_served_from_the_whole_layer() {
    let scene = Scene::new(&[]);
    let mount = scene.mount();
    scene.fault(usize::MAX, Fault::IgnoreRange);
    assert!(good(&mount, 11));
    eventually("the whole layer is requested", || scene.sent_whole());
    assert!(mount.read("b0") == noise(200, FILE));
    // Near the beginning of the layer, the reader skips the bytes that it did not ask for.
    drop(mount);
    let mount = scene.mount();
    assert!(good(&mount, 0));
    assert!(scene.layer_requests() > 0);
}

#[test]
fn parts_with_odd_headers_are_judged_by_their_bytes() {
    let scene = Scene::new(&[]);
    let label = |text: &str| Fault::ContentRange(text.to_owned());
    let encoding = |text: &str| Fault::Header("Content-Encoding".to_owned(), text.to_owned());
    for faults in [
        vec![encoding("gzip")],
        vec![encoding("x-gzip")],
        vec![encoding("aws-chunked")],
        vec![label("")],
        vec![label("bytes 0-99/100")],
        vec![label("bytes 7-999/1000000")],
        vec![label("nonsense")],
        vec![label(""), Fault::Chunked],
        vec![Fault::Wide(64 << 10)],
        vec![Fault::PartAsWhole],
        vec![Fault::Multipart],
    ] {
        let mount = scene.mount();
        for fault in faults.clone() {
            scene.fault(usize::MAX, fault);
        }
        for i in [3, 11, 0] {
            assert!(good(&mount, i), "{faults:?}");
        }
        assert!(!scene.sent_whole(), "{faults:?}");
        scene.registry.clear_faults();
    }
}

#[test]
fn parts_with_wrong_bytes_are_taken_from_the_whole_layer_from_then_on() {
    let scene = Scene::new(&[]);
    for fault in [Fault::OtherBytes, Fault::WholeAsPart, Fault::Compress("gzip")] {
        let mount = scene.mount();
        // Answers to requests without a range are right.
        let path = scene.layer.path();
        scene.registry.fault_ranges(&path, fault.clone());
        assert!(good(&mount, 11), "{fault:?}");
        // The registry logs an answer after it was sent.
        eventually("the whole layer is requested", || scene.sent_whole());
        // The reader has its bytes a moment before the request that brought them has been judged.
        let mut files = (0..11).rev();
        eventually("no more parts are requested", || {
            let file = files.next().expect("parts are requested again and again");
            scene.registry.clear_log();
            assert!(good(&mount, file), "{fault:?}");
            let log = scene.registry.log();
            let of_layer = log.iter().filter(|logged| logged.target.contains(&path));
            let ranged: Vec<bool> = of_layer.map(|logged| logged.headers.contains_key("range")).collect();
            !ranged.is_empty() && !ranged.contains(&true)
        });
        assert_eq!(mount.status()["problem"], serde_json::Value::Null, "{fault:?}");
        scene.registry.clear_faults();
    }
}

#[test]
fn whole_layers_are_read_whatever_their_encoding_says() {
    let tar = (0..3).fold(Tar::new(), |tar, i| tar.file(format!("a{i}"), noise(100 + i, FILE)));
    let tar = tar.file("zeros", vec![0; FILE]).finish();
    let label = |text: &str| Fault::Header("Content-Encoding".to_owned(), text.to_owned());
    for (kind, layer) in [
        ("gzip", Blob::gzip(&tar)),
        ("zstd", Blob::zstd(&tar)),
        ("plain", Blob::plain(tar)),
    ] {
        for faults in [
            vec![label("gzip")],
            vec![label("zstd")],
            vec![label("aws-chunked")],
            vec![label("gzip"), Fault::Chunked],
            vec![label("zstd"), Fault::Chunked],
            vec![Fault::Compress("gzip")],
            vec![Fault::Compress("gzip"), Fault::Chunked],
            vec![Fault::Compress("deflate"), Fault::NoLength],
            vec![Fault::Compress("zstd")],
            vec![Fault::Compress("zstd"), Fault::Chunked],
        ] {
            let registry = TestRegistry::start();
            push(&registry, "app", "1", std::slice::from_ref(&layer));
            for fault in faults.clone() {
                registry.fault(&layer.path(), usize::MAX, fault);
            }
            let said = Ocifs::new().run(["cat", &format!("{}/app:1", registry.host()), "a2"]);
            assert_eq!(said.code, Some(0), "{kind} {faults:?}: {}", said.stderr);
            assert!(said.stdout == noise(102, FILE), "{kind} {faults:?}");
        }
    }
}

/// Answers to ranges that make no sense, from a server that sends the whole blob well.
#[test]
fn odd_answers_to_ranges_cost_the_whole_layer_and_no_read() {
    let status = |code: u16, headers: &[(&str, &str)]| Fault::Status {
        code,
        headers: headers.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect(),
        body: String::new(),
    };
    let tar = (0..12).fold(Tar::new(), |tar, i| tar.file(format!("a{i}"), noise(100 + i, FILE)));
    let tar = tar.finish();
    for layer in [Blob::gzip(&tar), Blob::plain(tar)] {
        for faults in [
            vec![status(206, &[]), Fault::OnRanges(Box::new(Fault::NoLength))],
            vec![status(200, &[])],
            vec![status(204, &[])],
            vec![status(416, &[])],
            vec![status(416, &[("Content-Range", "bytes */0")])],
            vec![status(416, &[("Content-Range", "bytes */1000")])],
            vec![Fault::PartAsWhole, Fault::Chunked],
            vec![Fault::Short(1000)],
        ] {
            let registry = TestRegistry::start();
            push(&registry, "app", "1", std::slice::from_ref(&layer));
            let image = format!("{}/app:1", registry.host());
            let ocifs = Ocifs::with(&["--timeout", "20s"]);
            drop(ocifs.mount(&image));
            ocifs.ok(["cache", "drop"]);
            for fault in &faults {
                let fault = match fault {
                    Fault::OnRanges(_) => fault.clone(),
                    fault => Fault::OnRanges(Box::new(fault.clone())),
                };
                registry.fault(&layer.path(), usize::MAX, fault);
            }
            let mount = ocifs.mount_with(&image, &["--wait", "ready", "--prefetch", "none"]);
            let start = Instant::now();
            for i in [7, 0, 11, 3] {
                assert!(
                    mount.read(&format!("a{i}")) == noise(100 + i, FILE),
                    "{} {faults:?}: a{i}",
                    layer.media_type
                );
            }
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "{} {faults:?}",
                layer.media_type
            );
        }
    }
}

#[test]
fn a_server_that_refuses_ranges_is_asked_for_the_whole() {
    let scene = Scene::new(&[]);
    let mount = scene.mount();
    scene.fault(1, Fault::status(416));
    assert!(good(&mount, 3));
    eventually("the whole layer is requested", || scene.sent_whole());
}
