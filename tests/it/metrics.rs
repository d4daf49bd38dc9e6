//! `--metrics`: figures for a monitoring system, over HTTP and in a file.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::Command;

use crate::common::layers::{Blob, Tar, noise, push};
use crate::common::ocifs::{Mounted, Ocifs, PATIENCE, bounded, eventually, mountpoint};
use crate::common::registry::{Fault, TestRegistry};

const FILE: usize = 1 << 20;
const DOCUMENTATION: &str = include_str!("../../src/docs/metrics.md");

struct Scene {
    registry: TestRegistry,
    layer: Blob,
    image: String,
    ocifs: Ocifs,
}

impl Scene {
    fn new() -> Self {
        let registry = TestRegistry::start();
        let tar = Tar::new().file("a", noise(1, FILE)).file("b", noise(2, FILE));
        let layer = Blob::gzip(&tar.finish());
        push(&registry, "app", "1", std::slice::from_ref(&layer));
        let image = format!("{}/app:1", registry.host());
        Self {
            ocifs: Ocifs::knowing(&image),
            registry,
            layer,
            image,
        }
    }

    fn mount(&self, place: &str) -> Mounted {
        let options = [
            "--wait",
            "ready",
            "--prefetch",
            "none",
            "--via",
            "fuse",
            "--metrics",
            place,
        ];
        self.ocifs.mount_with(&self.image, &options)
    }
}

/// Samples by metric and labels, as they are written.
type Samples = BTreeMap<String, f64>;

/// Reads the text format of Prometheus, strictly: each metric has its help and its type right before its samples.
fn parse(text: &str) -> Samples {
    let mut samples = Samples::new();
    let (mut help, mut kind) = ("", "");
    assert!(text.ends_with('\n'));
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ').expect("a help text").0;
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, of) = rest.split_once(' ').unwrap();
            assert_eq!(name, help);
            assert!(["counter", "gauge"].contains(&of), "{line}");
            assert_eq!(of == "counter", name.ends_with("_total"), "{line}");
            kind = name;
        } else {
            let (labelled, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = labelled.split_once('{').unwrap();
            assert!(
                name == kind && labels.contains("mountpoint=\"") && labels.contains("image=\""),
                "{line}"
            );
            let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
            assert!(samples.insert(labelled.to_owned(), value).is_none(), "twice: {line}");
        }
    }
    samples
}

/// Returns the sum of the samples of a metric whose labels contain `label`.
fn value(samples: &Samples, name: &str, label: &str) -> f64 {
    let of_metric = samples.iter().filter(|(key, _)| key.split('{').next() == Some(name));
    let mut values = of_metric
        .filter(|(key, _)| key.contains(label))
        .map(|(_, value)| *value)
        .peekable();
    assert!(values.peek().is_some(), "{name} {label}: {samples:?}");
    values.sum()
}

/// Sends a request and returns the head and the body of the response.
fn exchange(mut stream: impl std::io::Read + std::io::Write, request: &str) -> (String, String) {
    stream.write_all(request.as_bytes()).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

fn tcp(place: &str) -> TcpStream {
    let stream = TcpStream::connect(place).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

const GET: &str = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";

#[test]
fn the_figures_are_those_of_the_status() {
    let scene = Scene::new();
    let mount = scene.mount("127.0.0.1:0");
    let place = mount.status()["metrics"].as_str().unwrap().to_owned();
    let before = parse(&exchange(tcp(&place), GET).1);
    assert_eq!(value(&before, "ocifs_fetched_bytes_total", ""), 0.0);
    // A response that is refused once is a request that is repeated.
    scene.registry.fault(&scene.layer.path(), 1, Fault::status(503));
    assert!(mount.read("a") == noise(1, FILE));
    let (head, body) = exchange(tcp(&place), GET);
    assert!(
        head.starts_with("HTTP/1.1 200 OK") && head.contains("Content-Type: text/plain; version=0.0.4"),
        "{head}"
    );
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    let (seen, status) = (parse(&body), mount.status());
    let number = |field: &str| status[field].as_f64().unwrap();
    for (name, field) in [
        ("ocifs_fetched_bytes_total", "fetched"),
        ("ocifs_used_bytes_total", "used"),
        ("ocifs_local_bytes", "local"),
        ("ocifs_image_bytes", "size"),
        ("ocifs_requests_total", "requests"),
        ("ocifs_ready_seconds", "ready_seconds"),
    ] {
        assert_eq!(value(&seen, name, ""), number(field), "{name}");
    }
    assert!(number("used") > FILE as f64 / 2.0);
    assert_eq!(value(&seen, "ocifs_retries_total", "cause=\"server_error\""), 1.0);
    assert_eq!(status["retries"]["server_error"], 1, "{status}");
    assert!(value(&seen, "ocifs_fetched_bytes_total", "reason=\"demand\"") > 0.0);
    assert_eq!(value(&seen, "ocifs_fetched_bytes_total", "reason=\"pass\""), 0.0);
    assert!(value(&seen, "ocifs_reads_total", "outcome=\"waited\"") > 0.0);
    assert!(value(&seen, "ocifs_resident_memory_bytes", "") > 1e6);
    assert_eq!(value(&seen, "ocifs_state", "state=\"ready\""), 1.0);
    assert_eq!(value(&seen, "ocifs_state", ""), 1.0);
    let digest = format!("manifest=\"{}\"", status["digest"].as_str().unwrap());
    assert_eq!(value(&seen, "ocifs_info", &digest), 1.0);

    // The documentation has each of these with their labels, and these are all of the documentation.
    let mut written: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for key in seen.keys() {
        let (name, labels) = key.split_once('{').unwrap();
        let names = labels
            .split('"')
            .step_by(2)
            .map(|text| text.trim_matches([',', '=', '}']));
        written
            .entry(name)
            .or_default()
            .extend(names.filter(|name| !["", "mountpoint", "image"].contains(name)));
    }
    let rows = DOCUMENTATION.lines().filter_map(|line| line.strip_prefix("| `ocifs_"));
    let mut documented: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    for row in rows {
        let cells: Vec<&str> = row.split(" | ").collect();
        let labels = cells[3]
            .split(", ")
            .map(|label| label.trim_matches('`'))
            .filter(|label| !label.is_empty());
        documented.insert(format!("ocifs_{}", cells[0].trim_end_matches('`')), labels.collect());
    }
    // There may be too few bytes to measure the bandwidth.
    documented.retain(|name, _| name != "ocifs_bandwidth_bytes_per_second" || written.contains_key(&**name));
    let documented: BTreeMap<&str, BTreeSet<&str>> = documented.iter().map(|(name, l)| (&**name, l.clone())).collect();
    assert_eq!(documented, written);

    let text = scene.ocifs.ok(["status", mount.path().to_str().unwrap()]);
    assert!(text.text().contains(&place), "{text:?}");
    assert_eq!(mount.umount(&[]).code, Some(0));
    assert!(TcpStream::connect(&place).is_err());
}

#[test]
fn other_requests_get_an_answer_and_nobody_holds_the_server_up() {
    let scene = Scene::new();
    let mount = scene.mount("127.0.0.1:0");
    let place = mount.status()["metrics"].as_str().unwrap().to_owned();
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "405"),
        ("HEAD /metrics HTTP/1.1\r\n\r\n", "200"),
        ("nonsense\r\n\r\n", "400"),
    ] {
        let (head, body) = exchange(tcp(&place), request);
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {head}");
        assert_eq!(body.is_empty(), request.starts_with("HEAD"), "{body}");
    }
    // As many clients as the server takes at a time send nothing. They are dropped, and the next one is served.
    let silent: Vec<TcpStream> = (0..16).map(|_| tcp(&place)).collect();
    let mut late = tcp(&place);
    late.write_all(GET.as_bytes()).unwrap();
    let mut response = String::new();
    late.read_to_string(&mut response).unwrap();
    assert!(response.starts_with("HTTP/1.1 200 "), "{response}");
    for mut stream in silent {
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn a_unix_socket_and_curl_work_too() {
    let scene = Scene::new();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("metrics");
    let place = format!("unix:{}", socket.display());
    let mount = scene.mount(&place);
    assert_eq!(mount.status()["metrics"], *place);
    let (_, body) = exchange(UnixStream::connect(&socket).unwrap(), GET);
    parse(&body);
    let mut curl = Command::new("curl");
    let said = bounded(
        curl.args(["--fail", "--silent", "--unix-socket"])
            .arg(&socket)
            .arg("http://localhost/metrics"),
    );
    assert_eq!(said.code, Some(0), "{said:?}");
    assert_eq!(
        parse(&body).keys().collect::<Vec<_>>(),
        parse(said.text()).keys().collect::<Vec<_>>()
    );
    assert_eq!(mount.umount(&[]).code, Some(0));
    assert!(!socket.exists());
}

#[test]
fn a_file_has_the_figures_until_the_end_and_the_last_ones() {
    let scene = Scene::new();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("app.prom");
    let mount = scene.mount(file.to_str().unwrap());
    eventually("it is written", || file.exists());
    assert_eq!(
        value(
            &parse(&std::fs::read_to_string(&file).unwrap()),
            "ocifs_used_bytes_total",
            ""
        ),
        0.0
    );
    mount.read("a");
    // It is written again without a request.
    eventually("it is written again", || {
        value(
            &parse(&std::fs::read_to_string(&file).unwrap()),
            "ocifs_used_bytes_total",
            "",
        ) > 0.0
    });
    mount.read("b");
    let used = mount.status()["used"].as_f64().unwrap();
    assert_eq!(mount.umount(&[]).code, Some(0));
    let last = parse(&std::fs::read_to_string(&file).unwrap());
    assert_eq!(value(&last, "ocifs_used_bytes_total", ""), used);
    assert_eq!(value(&last, "ocifs_state", "state=\"ended\""), 1.0);
    assert_eq!(value(&last, "ocifs_state", ""), 1.0);
    let names: Vec<_> = std::fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["app.prom"]);
}

#[test]
fn a_first_pass_and_evictions_are_counted() {
    let registry = TestRegistry::start();
    let tar = (0..16).fold(Tar::new(), |tar, i| tar.file(format!("f{i}"), noise(i, FILE)));
    push(&registry, "app", "1", &[Blob::gzip(&tar.finish())]);
    let image = format!("{}/app:1", registry.host());
    let ocifs = Ocifs::with(&["--cache-size", "8MiB"]);
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("metrics");
    let place = format!("unix:{}", socket.display());
    let mount = ocifs.mount_with(&image, &["--wait", "ready", "--prefetch", "none", "--metrics", &place]);
    for i in 0..16 {
        let name = format!("f{i}");
        assert!(mount.read(&name) == noise(i, FILE));
        mount.forget(&name);
    }
    let seen = parse(&exchange(UnixStream::connect(&socket).unwrap(), GET).1);
    assert!(value(&seen, "ocifs_fetched_bytes_total", "reason=\"pass\"") > FILE as f64);
    assert!(value(&seen, "ocifs_evicted_spans_total", "") > 0.0, "{seen:?}");
    assert!(value(&seen, "ocifs_evicted_bytes_total", "") > 0.0, "{seen:?}");
}

#[test]
fn a_disk_has_figures_too() {
    let scene = Scene::new();
    let directory = mountpoint();
    let file = directory.path().join("socket");
    let (disk, place) = (directory.path().join("nbd"), format!("unix:{}", file.display()));
    scene.ocifs.ok([
        "disk",
        "--metrics",
        &place,
        "--nbd",
        disk.to_str().unwrap(),
        &scene.image,
    ]);
    let seen = parse(&exchange(UnixStream::connect(&file).unwrap(), GET).1);
    assert_eq!(value(&seen, "ocifs_info", "via=\"disk\""), 1.0);
    assert!(
        value(
            &seen,
            "ocifs_image_bytes",
            &format!("mountpoint=\"{}\"", disk.display())
        ) > 0.0
    );
    scene.ocifs.ok(["umount", disk.to_str().unwrap()]);
}

#[test]
fn a_place_that_cannot_be_used_is_an_error_before_the_mount() {
    let scene = Scene::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let directory = tempfile::tempdir().unwrap();
    let nowhere = directory.path().join("absent/app.prom");
    let socket = format!("unix:{}", directory.path().join("absent/socket").display());
    for (place, part) in [
        (&*address, "in use"),
        (nowhere.to_str().unwrap(), "No such file"),
        (&socket, "No such file"),
        (directory.path().to_str().unwrap(), "directory"),
    ] {
        let error = scene.ocifs.mount_fails(&scene.image, &["--metrics", place]);
        let shown = place.trim_start_matches("unix:");
        assert!(
            error.contains("metrics") && error.contains(shown) && error.contains(part),
            "{place}: {error}"
        );
    }
    let directory = mountpoint();
    let said = scene.ocifs.run([
        "mount",
        "--metrics",
        "nonsense",
        &scene.image,
        directory.path().to_str().unwrap(),
    ]);
    assert!(
        said.code == Some(2) && said.stderr.contains("no place for metrics"),
        "{said:?}"
    );
}
