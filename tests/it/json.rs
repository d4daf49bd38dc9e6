//! JSON output: every field is documented, and every documented field exists.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::common::layers::{Blob, Tar, header, noise, push};
use crate::common::ocifs::{Ocifs, Said, bounded, eventually, mountpoint, send};
use crate::common::registry::TestRegistry;

const DOCUMENTATION: &str = include_str!("../../src/docs/json.md");

/// Fields of output that takes trouble which this test does not make.
const OF_TROUBLE: [&str; 6] = [
    "unchecked[].path",
    "unchecked[].reason",
    "differences[].location",
    "differences[].authority",
    "differences[].layer",
    "differences[].differs",
];

/// A field, as the documentation has it.
#[derive(Debug, Clone)]
struct Field {
    path: String,
    is_optional: bool,
    kind: String,
}

/// Returns the fields of the tables of the documentation, by the heading above each table.
fn tables() -> BTreeMap<&'static str, Vec<Field>> {
    let mut tables: BTreeMap<&str, Vec<Field>> = BTreeMap::new();
    let mut heading = "";
    for line in DOCUMENTATION.lines() {
        if let Some(text) = line.strip_prefix('#') {
            heading = text.trim_start_matches('#').trim();
        } else if let Some(row) = line.strip_prefix("| `") {
            let cells: Vec<&str> = row.split(" | ").collect();
            let (name, optional) = cells[0].split_once('`').unwrap();
            tables.entry(heading).or_default().push(Field {
                path: name.to_owned(),
                is_optional: optional == "*",
                kind: cells[1].to_owned(),
            });
        }
    }
    tables
}

/// Returns the fields of an object and of those within it, with their paths.
fn expanded(table: &str, prefix: &str, tables: &BTreeMap<&str, Vec<Field>>) -> Vec<Field> {
    let fields = tables.get(table).unwrap_or_else(|| panic!("no table {table}"));
    let mut all = Vec::new();
    for field in fields {
        let path = format!("{prefix}{}", field.path);
        all.push(Field {
            path: path.clone(),
            ..field.clone()
        });
        if let Some((_, rest)) = field.kind.split_once('[')
            && let Some((name, _)) = rest.split_once("](#")
        {
            let list = if field.kind.starts_with("list of") { "[]" } else { "" };
            all.extend(expanded(name, &format!("{path}{list}."), tables));
        }
    }
    all
}

/// Adds the paths of all fields of a value. Does not look into documents, which are as others have written them.
fn collect(value: &Value, prefix: &str, documents: &[&str], found: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                let path = format!("{prefix}{name}");
                found.insert(path.clone());
                if documents.contains(&path.as_str()) {
                    continue;
                }
                let next = if value.is_array() { path } else { format!("{path}.") };
                collect(value, &next, documents, found);
            }
        }
        Value::Array(values) => values
            .iter()
            .for_each(|value| collect(value, &format!("{prefix}[]."), documents, found)),
        _ => {}
    }
}

/// Whether a value has the type that the documentation states.
fn fits(value: &Value, kind: &str) -> bool {
    let (kind, nullable) = match kind.strip_suffix(" or null") {
        Some(kind) => (kind, true),
        None => (kind, false),
    };
    match value {
        Value::Null => nullable,
        Value::Bool(_) => kind == "boolean",
        Value::Number(_) => kind == "number",
        Value::String(_) => kind == "string",
        Value::Array(values) => {
            kind.starts_with("list of") && (kind != "list of strings" || values.iter().all(Value::is_string))
        }
        Value::Object(_) => kind == "document" || kind.starts_with('['),
    }
}

/// Compares output with the tables of the documentation, both ways.
fn compare(heading: &str, outputs: &[Value]) {
    let tables = tables();
    let fields = expanded(heading, "", &tables);
    let documents: Vec<&str> = fields
        .iter()
        .filter(|field| field.kind == "document")
        .map(|f| f.path.as_str())
        .collect();
    let mut found = BTreeSet::new();
    assert!(!outputs.is_empty(), "{heading}");
    for output in outputs {
        assert_eq!(output["schema"], 1, "{heading}: {output}");
        collect(output, "", &documents, &mut found);
        for field in tables[heading].iter() {
            match output.get(&field.path) {
                Some(value) => assert!(fits(value, &field.kind), "{heading}: {field:?}: {value}"),
                None => assert!(field.is_optional, "{heading}: {field:?} is missing: {output}"),
            }
        }
    }
    let documented: BTreeSet<String> = fields.into_iter().map(|field| field.path).collect();
    let unknown: Vec<_> = found.difference(&documented).collect();
    assert!(unknown.is_empty(), "{heading}: not documented: {unknown:?}");
    let unseen = documented
        .difference(&found)
        .filter(|path| !OF_TROUBLE.contains(&path.as_str()));
    let unseen: Vec<_> = unseen.collect();
    assert!(unseen.is_empty(), "{heading}: documented, and not there: {unseen:?}");
}

fn lines(said: &Said) -> Vec<Value> {
    said.text()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn list(said: &Said) -> Vec<Value> {
    said.json().as_array().unwrap().clone()
}

/// A registry with an image of which something is odd.
struct Scene {
    _registry: TestRegistry,
    image: String,
    ocifs: Ocifs,
}

impl Scene {
    fn new() -> Self {
        let registry = TestRegistry::start();
        let owner = [("uid", &b"4294967303"[..])];
        let mut link = header(b"link", tar::EntryType::Symlink, 0o777, 0);
        link.set_link_name_literal(b"caf\xe9").unwrap();
        let tar = Tar::new()
            .pax(&owner)
            .file(b"caf\xe9", b"latin\n")
            .file("big", noise(3, 300_000))
            .raw(link, b"");
        push(&registry, "app", "1", &[Blob::gzip(&tar.finish())]);
        let image = format!("{}/app:1", registry.host());
        Self {
            _registry: registry,
            image,
            ocifs: Ocifs::new(),
        }
    }
}

/// Takes places down at the end, also of a test that failed.
struct Places<'a>(&'a Ocifs, Vec<OsString>);

impl Drop for Places<'_> {
    fn drop(&mut self) {
        let mut umount = self.0.command(["umount", "--lazy"]);
        bounded(umount.args(&self.1));
    }
}

/// Returns a port of loopback that is free at the moment.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

#[test]
fn mounts_are_documented() {
    let scene = Scene::new();
    let (directory, file) = (mountpoint(), mountpoint());
    let odd = directory.path().join(std::ffi::OsStr::from_bytes(b"caf\xe9"));
    std::fs::create_dir(&odd).unwrap();
    let metrics = format!("unix:{}", directory.path().join("metrics").display());
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (socket, blk, file) = (
        text(&directory.path().join("nbd")),
        text(&directory.path().join("blk")),
        text(file.path()),
    );
    let port = format!("127.0.0.1:{}", free_port());

    let places = [odd.as_os_str(), socket.as_ref(), port.as_ref()].map(OsString::from);
    let _places = Places(&scene.ocifs, places.to_vec());
    let mount = |options: &[&str]| {
        let arguments = [
            &["mount", "--json", "--wait", "ready", "--metrics", &metrics],
            options,
            &[&scene.image],
        ]
        .concat();
        bounded(scene.ocifs.command(&arguments).arg(&odd)).json()
    };
    let disk = |options: &[&str]| {
        scene
            .ocifs
            .ok([&["disk", "--json"], options, &[&scene.image]].concat())
            .json()
    };
    let served = [
        mount(&["--via", "fuse"]),
        disk(&["--nbd", &socket, "--file", &file, "--vhost-user-blk", &blk]),
        disk(&["--nbd", &port]),
    ];
    compare("`ocifs mount`, `ocifs disk`", &served);

    // So far the registry has confirmed the tag. A mount from now on does not ask.
    let of_test = |row: &Value| served.iter().any(|mount| mount["pid"] == row["pid"]);
    let mut umounted = lines(&bounded(scene.ocifs.command(["umount", "--json"]).arg(&odd)));
    let again = mount(&["--via", "fuse", "--pull", "never"]);
    std::fs::read(odd.join("big")).unwrap();
    let status = bounded(scene.ocifs.command(["status", "--json"]).arg(&odd)).json();
    assert_eq!((&status["state"], &status["pid"]), (&"ready".into(), &again["pid"]));
    let mut all = list(&scene.ocifs.ok(["list", "--json"]));
    all.retain(|row| of_test(row) || row["pid"] == again["pid"]);
    assert_eq!(all.len(), 3);
    all.push(status);
    compare("`ocifs status`, `ocifs list`", &all);

    for place in [
        odd.as_os_str(),
        socket.as_ref(),
        port.as_ref(),
        "/nowhere/at/all".as_ref(),
    ] {
        umounted.extend(lines(&bounded(scene.ocifs.command(["umount", "--json"]).arg(place))));
    }
    compare("`ocifs umount`", &umounted);
    let summary = &umounted[1]["summary"];
    assert!(
        summary["used"].as_u64() > Some(100_000) && summary["reads"].as_u64() > Some(0),
        "{summary}"
    );
}

#[test]
fn images_are_documented() {
    let scene = Scene::new();
    let (host, image) = (&scene.ocifs, &*scene.image);
    let pulled = [
        host.ok(["pull", "--json", image]).json(),
        host.ok(["pull", "--json", "--pull", "never", image]).json(),
    ];
    compare("`ocifs pull`", &pulled);
    let inspected = [
        host.ok(["inspect", "--json", image]).json(),
        host.ok(["inspect", "--json", "--pull", "never", image]).json(),
    ];
    assert_ne!(inspected[0]["oddities"], serde_json::json!([]));
    compare("`ocifs inspect`", &inspected);
    compare("`ocifs ls`", &lines(&host.ok(["ls", "--json", image])));
    let bundle = mountpoint();
    let odd = bundle.path().join(std::ffi::OsStr::from_bytes(b"caf\xe9"));
    let made = bounded(host.command(["bundle", "--json", image]).arg(&odd)).json();
    compare("`ocifs bundle`", &[made]);
    assert_eq!(bounded(host.command(["umount"]).arg(odd.join("rootfs"))).code, Some(0));
    compare("`ocifs images`", &list(&host.ok(["images", "--json"])));
    compare("`ocifs cache list`", &list(&host.ok(["cache", "list", "--json"])));
    compare("`ocifs cache verify`", &[host.ok(["cache", "verify", "--json"]).json()]);
    #[cfg(feature = "snapshotter")]
    compare(
        "`ocifs snapshotter check`",
        &list(&host.run(["snapshotter", "check", "--json"])),
    );
    compare("`ocifs cache rm`", &lines(&host.ok(["cache", "rm", "--json", image])));
}

#[test]
fn profiles_and_indexes_are_documented() {
    let scene = Scene::new();
    let (host, image) = (&scene.ocifs, &*scene.image);
    let mount = host.mount(image);
    mount.read("big");
    assert_eq!(mount.umount(&[]).code, Some(0));
    compare(
        "`ocifs profile show`",
        &list(&host.ok(["profile", "show", "--json", image])),
    );
    let indexes = host.home().join("indexes");
    let indexes = indexes.to_str().unwrap();
    let built = host.ok(["index", "build", "--json", "--output", indexes, image]).json();
    let pushed = host.ok(["index", "push", "--json", image, indexes]).json();
    compare("`ocifs index build`, `ocifs index push`", &[built, pushed]);
    let options = ["--index", indexes, "--index-trust-location"];
    let verified = host
        .ok([&options[..], &["index", "verify", "--json", image]].concat())
        .json();
    compare("`ocifs index verify`", &[verified]);
}

#[test]
fn a_mount_whose_process_is_dead_has_no_summary() {
    let scene = Scene::new();
    let mount = scene.ocifs.mount(&scene.image);
    send(mount.pid, Signal::SIGKILL);
    eventually("it is dead", || mount.status()["state"] == "dead");
    let said = &lines(&mount.umount(&["--json"]))[0];
    assert_eq!(
        (&said["unmounted"], &said["summary"]),
        (&true.into(), &Value::Null),
        "{said}"
    );
}
