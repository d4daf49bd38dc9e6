//! Tags whose registry cannot be asked or must not be asked.

use serde_json::Value;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Ocifs, bounded, mountpoint};
use crate::common::registry::{Fault, TestRegistry};

const SIZE: usize = 100_000;

fn layer(seed: u64) -> Blob {
    Blob::gzip(&Tar::new().file("f", noise(seed, SIZE)).finish())
}

/// Returns a registry with an image whose tag was pulled, the program, and the image's name.
fn pulled() -> (TestRegistry, Ocifs, String) {
    let registry = TestRegistry::start();
    push(&registry, "app", "1", &[layer(1)]);
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::new();
    let said = ocifs.ok(["pull", "--json", &image]);
    assert_eq!(said.json()["unconfirmed"], Value::Null);
    (registry, ocifs, image)
}

#[track_caller]
fn warned(stderr: &str, why: &str) {
    assert!(stderr.contains("warning: using") && stderr.contains(why), "{stderr}");
}

#[test]
fn a_tag_that_was_pulled_works_without_its_registry() {
    let (registry, ocifs, image) = pulled();
    drop(registry);
    let said = ocifs.ok(["cat", &image, "f"]);
    assert!(said.stdout == noise(1, SIZE));
    warned(&said.stderr, "cannot reach");
    let said = ocifs.ok(["pull", "--json", &image]);
    warned(&said.stderr, "cannot reach");
    assert!(
        said.json()["unconfirmed"]["reason"]
            .as_str()
            .unwrap()
            .contains("cannot reach")
    );
    for command in ["inspect", "ls"] {
        warned(&ocifs.ok([command, &image]).stderr, "cannot reach");
    }
    let said = ocifs.ok(["inspect", "--json", &image]);
    let since = said.json()["unconfirmed"]["since"].as_str().unwrap().to_owned();
    let age = humantime::parse_rfc3339(&since).unwrap().elapsed().unwrap();
    assert!(age.as_secs() < 120, "{since}");

    let directory = mountpoint();
    let path = directory.path().to_str().unwrap();
    let said = bounded(&mut ocifs.command(["mount", "--wait", "ready", &image, path]));
    assert_eq!(said.code, Some(0), "{said:?}");
    warned(&said.stderr, "cannot reach");
    assert!(std::fs::read(directory.path().join("f")).unwrap() == noise(1, SIZE));
    let status = ocifs.ok(["status", "--json", path]).json();
    assert_eq!(status["unconfirmed"]["since"], since);
    let text = ocifs.ok(["status", path]).text().to_owned();
    assert!(
        text.contains(&format!("last confirmed at {since}: cannot reach")),
        "{text}"
    );
    ocifs.ok(["umount", path]);
}

#[test]
fn a_registry_that_fails_or_is_silent_is_as_good_as_gone() {
    for (fault, why) in [
        (Fault::status(503), "503"),
        (Fault::status(429), "limits the rate"),
        (Fault::Silence, "did not answer"),
    ] {
        let (registry, ocifs, image) = pulled();
        let ocifs = ocifs.options(&["--timeout", "2s"]);
        registry.fault("/manifests/", usize::MAX, fault);
        let said = ocifs.ok(["cat", &image, "f"]);
        assert!(said.stdout == noise(1, SIZE));
        warned(&said.stderr, why);
    }
}

/// Answers that are no manifest: the login page of a hotel's network, or the empty answer of a proxy.
#[test]
fn an_answer_that_is_no_manifest_is_no_answer() {
    let page = Fault::Status {
        code: 200,
        headers: vec![("Content-Type".to_owned(), "text/html".to_owned())],
        body: "<html>Please log in</html>".to_owned(),
    };
    let empty = Fault::Status {
        code: 200,
        headers: Vec::new(),
        body: String::new(),
    };
    for fault in [page, empty] {
        let (registry, ocifs, image) = pulled();
        registry.fault("/manifests/", usize::MAX, fault);
        let said = ocifs.ok(["cat", &image, "f"]);
        assert!(said.stdout == noise(1, SIZE));
        warned(&said.stderr, "no manifest");
        drop(registry);
        // The store still knows what the tag means.
        assert!(ocifs.ok(["cat", &image, "f"]).stdout == noise(1, SIZE));
        assert!(ocifs.ok(["cat", "--pull", "never", &image, "f"]).stdout == noise(1, SIZE));
    }
}

#[test]
fn a_registry_that_says_no_is_believed() {
    for code in [401, 403, 404] {
        let (registry, ocifs, image) = pulled();
        registry.fault("/v2/", usize::MAX, Fault::status(code));
        ocifs.fails(["cat", &image, "f"]);
    }
    // A tag that was never seen is an error.
    let (registry, ocifs, image) = pulled();
    drop(registry);
    let error = ocifs.fails(["cat", &image.replace(":1", ":2"), "f"]);
    assert!(error.contains("cannot reach"), "{error}");
}

#[test]
fn tags_are_followed_while_the_registry_answers() {
    let (registry, ocifs, image) = pulled();
    push(&registry, "app", "1", &[layer(2)]);
    let said = ocifs.ok(["cat", &image, "f"]);
    assert!(
        said.stdout == noise(2, SIZE) && said.stderr.is_empty(),
        "{}",
        said.stderr
    );
    drop(registry);
    assert!(ocifs.ok(["cat", &image, "f"]).stdout == noise(2, SIZE));
}

#[test]
fn when_to_ask_can_be_chosen() {
    let (registry, ocifs, image) = pulled();
    push(&registry, "app", "1", &[layer(2)]);
    push(&registry, "app", "2", &[layer(3)]);
    let other = image.replace(":1", ":2");
    let cat = |when: &str, image: &str| ocifs.run(["cat", "--pull", when, image, "f"]);
    registry.clear_log();
    // A known tag is used without a request and without a warning.
    for when in ["missing", "never"] {
        let said = cat(when, &image);
        assert!(
            said.stdout == noise(1, SIZE) && said.stderr.is_empty(),
            "{when}: {}",
            said.stderr
        );
        let said = ocifs.ok(["inspect", "--json", "--pull", when, &image]);
        assert!(said.json()["unconfirmed"]["since"].is_string());
        assert_eq!(said.json()["unconfirmed"]["reason"], Value::Null);
    }
    let mount = ocifs.mount_with(&image, &["--wait", "ready", "--pull", "never"]);
    assert!(mount.read("f") == noise(1, SIZE));
    assert!(mount.status()["unconfirmed"]["since"].is_string());
    drop(mount);
    assert_eq!(registry.log().len(), 0);
    let said = cat("never", &other);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.stderr.contains("not in the store"), "{said:?}");
    assert_eq!(registry.log().len(), 0);
    assert!(cat("missing", &other).stdout == noise(3, SIZE));
    assert!(cat("always", &image).stdout == noise(2, SIZE));
    drop(registry);
    let said = cat("always", &image);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.stderr.contains("cannot reach"), "{said:?}");
    for (when, image, seed) in [("missing", &image, 2), ("never", &other, 3)] {
        let said = cat(when, image);
        assert!(
            said.stdout == noise(seed, SIZE) && said.stderr.is_empty(),
            "{when}: {}",
            said.stderr
        );
    }
}
