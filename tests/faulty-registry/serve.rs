//! Serves OCI layouts with the tests' registry, which misbehaves on request. It is run by hand.
#![allow(clippy::unwrap_used)]

#[path = "../it/common"]
mod common {
    pub mod registry;
}

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::Parser;
use serde_json::Value;

use common::registry::{Guard, NAMES, Rule, TestRegistry, Tokens};

/// Time between two checks of the control file and the log.
const LOOK: Duration = Duration::from_millis(50);

/// Serve OCI layouts as a registry that misbehaves on request.
#[derive(Debug, Parser)]
#[command(name = "faulty-registry", after_help = format!("A RULE is `[TIMES] PART FAULT`: the fault of the next TIMES requests (all, if left out) whose path contains PART.\n\nFaults:\n{NAMES}"))]
struct Arguments {
    /// OCI layout directories; each is the repository of its name, and its images have their names as tags
    #[arg(required = true)]
    layouts: Vec<PathBuf>,
    /// Address to listen at
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: String,
    /// What goes wrong
    #[arg(long, value_name = "RULE")]
    fault: Vec<Rule>,
    /// File with a rule a line; whenever it changes, its rules take the place of all others
    #[arg(long, value_name = "FILE")]
    control: Option<PathBuf>,
    /// Want this user and password
    #[arg(long, value_name = "USER:PASSWORD")]
    login: Option<String>,
    /// Want a token, and the login for it if there is one
    #[arg(long)]
    token: bool,
    /// Answer wrong credentials with this status and no challenge
    #[arg(long, value_name = "STATUS")]
    refuse_with: Option<u16>,
    /// Redirect requests for blobs to another port, by URLs that are good for this many requests
    #[arg(long, value_name = "USES")]
    redirect: Option<usize>,
    /// Delay every answer by this many milliseconds
    #[arg(long, value_name = "MS", default_value_t = 0)]
    latency: u64,
}

fn main() {
    let arguments = Arguments::parse();
    let registry = TestRegistry::start_at(&arguments.listen);
    for layout in &arguments.layouts {
        load(&registry, layout);
    }
    let login = arguments.login.as_deref().map(|login| {
        let (user, password) = login.split_once(':').expect("--login wants USER:PASSWORD");
        (user.to_owned(), password.to_owned())
    });
    match (login, arguments.token) {
        (login, true) => registry.guard(Guard::Bearer(Tokens {
            login,
            ..Tokens::default()
        })),
        (Some((user, password)), false) => registry.guard(Guard::Basic(user, password)),
        (None, false) => {}
    }
    if let Some(code) = arguments.refuse_with {
        registry.refuse_with(code);
    }
    registry.latency(Duration::from_millis(arguments.latency));
    let storage = arguments.redirect.map(|uses| {
        let storage = TestRegistry::start();
        registry.redirect_blobs(&storage, uses, "", 1);
        storage
    });
    let set = |rules: Vec<Rule>| {
        for registry in [Some(&registry), storage.as_ref()].into_iter().flatten() {
            registry.clear_faults();
        }
        for Rule { times, part, fault } in rules {
            // A redirect leads to the same blob, so it gets the same fault.
            if let Some(storage) = &storage {
                storage.fault(&part.replace("/blobs/", "/storage/"), times, fault.clone());
            }
            registry.fault(&part, times, fault);
        }
    };
    set(arguments.fault.clone());
    println!("{}", registry.host());
    let mut seen = None;
    loop {
        if let Some(control) = &arguments.control {
            let changed = std::fs::metadata(control).and_then(|found| found.modified()).ok();
            if changed != seen {
                seen = changed;
                set(read_control(control, seen));
            }
        }
        for log in [Some(&registry), storage.as_ref()]
            .into_iter()
            .flatten()
            .map(TestRegistry::take_log)
        {
            for logged in log {
                let range = logged.headers.get("range").map_or("", String::as_str);
                eprintln!(
                    "{} {} {} {} {range}",
                    logged.status, logged.sent, logged.method, logged.target
                );
            }
        }
        std::thread::sleep(LOOK);
    }
}

/// Returns the rules of a control file. Returns none if there is no file, or if the file has a mistake, which is
/// reported.
fn read_control(path: &Path, changed: Option<SystemTime>) -> Vec<Rule> {
    if changed.is_none() {
        return Vec::new();
    }
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines = text.lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(str::parse)
        .collect::<Result<_, _>>()
        .unwrap_or_else(|error: String| {
            eprintln!("{}: {error}", path.display());
            Vec::new()
        })
}

/// Adds all of a layout to the repository named like its directory.
fn load(registry: &TestRegistry, layout: &Path) {
    let repository = std::fs::canonicalize(layout).unwrap();
    let repository = repository.file_name().unwrap().to_str().unwrap().to_lowercase();
    let read = |path: PathBuf| std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let blob = |digest: &str| read(layout.join("blobs").join(digest.replace(':', "/")));
    let index: Value = serde_json::from_slice(&read(layout.join("index.json"))).unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut entries: Vec<(Value, Option<String>)> = Vec::new();
    for entry in index["manifests"].as_array().unwrap() {
        let name = entry["annotations"]["org.opencontainers.image.ref.name"].as_str();
        entries.push((entry.clone(), Some(name.unwrap_or("latest").to_owned())));
    }
    while let Some((entry, tag)) = entries.pop() {
        let bytes = blob(&text(&entry["digest"]));
        let document: Value = serde_json::from_slice(&bytes).unwrap();
        for child in document["manifests"].as_array().into_iter().flatten() {
            entries.push((child.clone(), None));
        }
        let layers = document["layers"].as_array().into_iter().flatten();
        for descriptor in layers.chain(document.get("config")) {
            registry.add_blob(blob(&text(&descriptor["digest"])));
        }
        registry.add_manifest(&repository, tag.as_deref(), &text(&entry["mediaType"]), bytes);
    }
}
