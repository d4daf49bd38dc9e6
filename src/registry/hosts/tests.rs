use std::fs;

use proptest::prelude::*;
use reqwest::Url;
use tempfile::TempDir;

use super::*;
use crate::oci::ReferenceSelector;

fn known(registry: &str, repository: &str, plain: &PlainHttp) -> Repository {
    Repository::new(Endpoint::new(registry, plain).unwrap(), repository).unwrap()
}

/// Files in a directory of their own.
struct Machine {
    directory: TempDir,
    files: HostFiles,
}

impl Machine {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let files = HostFiles {
            from: HostsFrom::All,
            containerd: vec![at("containerd")],
            containers: vec![at("user.conf"), at("registries.conf")],
            containers_more: vec![at("registries.conf.d"), at("user.conf.d")],
            certificates: vec![at("docker"), at("containers")],
        };
        Self { directory, files }
    }

    fn write(&self, name: &str, text: &str) -> &Self {
        let path = self.directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    fn places_of(&self, registry: &str, repository: &str) -> Result<Vec<ImagePlace>, BlobError> {
        self.places_for(registry, repository, false, PlainHttp::Loopback)
    }

    fn places_for(
        &self,
        registry: &str,
        repository: &str,
        by_digest: bool,
        plain: PlainHttp,
    ) -> Result<Vec<ImagePlace>, BlobError> {
        self.files
            .places(&known(registry, repository, &plain), by_digest, &plain)
    }

    /// Returns the URL of a manifest at each place.
    fn urls(&self, registry: &str, repository: &str) -> Vec<String> {
        let places = self.places_of(registry, repository).unwrap();
        let url = |place: &ImagePlace| place.repository.manifest_url(&ReferenceSelector::tag("1")).unwrap();
        places.iter().map(|place| Url::into(url(place))).collect()
    }
}

#[test]
fn without_files_there_is_the_registry_alone() {
    let machine = Machine::new();
    let places = machine.places_of("quay.io", "a/b").unwrap();
    let registry = known("quay.io", "a/b", &PlainHttp::Loopback);
    let [place] = &places[..] else { panic!("{places:?}") };
    assert_eq!(place.repository, registry);
    assert!(place.resolves && place.pulls);
    let none = HostFiles::none().places(&registry, false, &PlainHttp::Loopback);
    assert_eq!(none.unwrap(), places);
}

#[test]
fn hosts_come_in_the_order_of_the_file_and_the_server_last() {
    let machine = Machine::new();
    machine.write(
        "containerd/docker.io/hosts.toml",
        r#"
        server = "https://registry-1.docker.io"

        [host."https://z.lan"]
          capabilities = ["Pull"]
        [host."http://a.lan:5000"]
          capabilities = ["pull", "resolve", "push"]
          [host."http://a.lan:5000".header]
            x-key = "s3cret"
            x-more = ["1", "2"]
        [host."m.lan/hub"]
        [host."https://o.lan/api/docker/hub/"]
          override_path = true
        [host."https://v.lan/pre/v2/"]
          dial_timeout = "1s"
        "#,
    );
    assert_eq!(
        machine.urls("docker.io", "library/alpine"),
        [
            "https://z.lan/v2/library/alpine/manifests/1?ns=docker.io",
            "http://a.lan:5000/v2/library/alpine/manifests/1?ns=docker.io",
            "https://m.lan/hub/v2/library/alpine/manifests/1?ns=docker.io",
            "https://o.lan/api/docker/hub/library/alpine/manifests/1?ns=docker.io",
            "https://v.lan/pre/v2/library/alpine/manifests/1?ns=docker.io",
            "https://registry-1.docker.io/v2/library/alpine/manifests/1",
        ]
    );
    let places = machine.places_of("docker.io", "library/alpine").unwrap();
    assert!(places[0].pulls && !places[0].resolves);
    assert!(places[1].pulls && places[1].resolves && places[2].resolves);
    let names: Vec<&str> = places.iter().map(|place| place.repository.endpoint.name()).collect();
    assert_eq!(
        names,
        ["z.lan", "a.lan:5000", "m.lan", "o.lan", "v.lan", "docker.io"],
        "for logins"
    );
    let headers = &places[1].repository.endpoint.settings().headers;
    assert_eq!(headers["x-key"], "s3cret");
    assert_eq!(headers.get_all("x-more").iter().count(), 2);
    assert!(!format!("{places:?}").contains("s3cret"));
    assert!(places[0].repository.endpoint.settings().headers.is_empty());
}

#[test]
fn a_file_need_not_name_the_server_and_may_name_another() {
    let machine = Machine::new();
    machine.write(
        "containerd/r.lan_5000_/hosts.toml",
        "ca = \"own.crt\"\n[host.\"http://127.0.0.1:30020\"]\ncapabilities = [\"pull\"]\n",
    );
    machine.write(
        "containerd/other.lan/hosts.toml",
        "server = \"http://elsewhere.lan:80\"\n",
    );
    assert_eq!(
        machine.urls("r.lan:5000", "a"),
        [
            "http://127.0.0.1:30020/v2/a/manifests/1?ns=r.lan%3A5000",
            "https://r.lan:5000/v2/a/manifests/1"
        ]
    );
    let places = machine.places_of("r.lan:5000", "a").unwrap();
    let own = machine.directory.path().join("containerd/r.lan_5000_/own.crt");
    assert_eq!(places[1].repository.endpoint.settings().tls.authorities, [own]);
    assert_eq!(
        machine.urls("other.lan", "a"),
        ["http://elsewhere.lan/v2/a/manifests/1?ns=other.lan"]
    );
}

#[test]
fn certificates_in_all_their_forms() {
    let machine = Machine::new();
    let directory = machine.directory.path().join("containerd/r.lan");
    let host = |lines: &str| {
        let text = format!("[host.\"https://m.lan\"]\n{lines}\n");
        machine.write("containerd/r.lan/hosts.toml", &text);
        let places = machine.places_of("r.lan", "a").unwrap();
        places[0].repository.endpoint.settings().tls.clone()
    };
    let client = |certificate: &str, key: Option<&str>| crate::registry::host_settings::ClientFiles {
        certificate: directory.join(certificate),
        key: key.map(|key| directory.join(key)),
    };
    assert_eq!(host("ca = \"a.crt\"").authorities, [directory.join("a.crt")]);
    assert_eq!(
        host("ca = [\"a.crt\", \"/abs/b.crt\"]").authorities,
        [directory.join("a.crt"), "/abs/b.crt".into()]
    );
    assert_eq!(host("client = \"c.pem\"").clients, [client("c.pem", None)]);
    assert_eq!(
        host("client = [\"c.pem\", \"d.pem\"]").clients,
        [client("c.pem", None), client("d.pem", None)]
    );
    assert_eq!(
        host("client = [[\"c.cert\", \"c.key\"], [\"d.pem\", \"\"]]").clients,
        [client("c.cert", Some("c.key")), client("d.pem", None)]
    );
    assert!(host("skip_verify = true").is_unverified);
    // Docker's files of the mirror's own host are added.
    machine
        .write("docker/m.lan/ca.crt", "")
        .write("docker/m.lan/z.cert", "")
        .write("docker/m.lan/z.key", "")
        .write("containers/m.lan/other.crt", "")
        .write("containers/m.lan/README", "");
    let tls = host("");
    let at = |name: &str| machine.directory.path().join(name);
    assert_eq!(
        tls.authorities,
        [at("docker/m.lan/ca.crt"), at("containers/m.lan/other.crt")]
    );
    assert_eq!(tls.clients.len(), 1);
    assert_eq!(tls.clients[0].key.as_deref(), Some(&*at("docker/m.lan/z.key")));
    let alone = machine.places_of("m.lan", "a").unwrap();
    assert_eq!(alone[0].repository.endpoint.settings().tls, tls, "also as a registry");
}

#[test]
fn plain_http_with_certificates_tries_tls_first() {
    let machine = Machine::new();
    machine.write(
        "containerd/r.lan/hosts.toml",
        "[host.\"http://m.lan:5000\"]\nskip_verify = true\n",
    );
    let places = machine.places_of("r.lan", "a").unwrap();
    let mirror = &places[0].repository.endpoint;
    assert!(mirror.is_open() && mirror.base().scheme() == "https");
    let forbidden = machine.places_for("r.lan", "a", false, PlainHttp::Nowhere).unwrap();
    assert_eq!(forbidden.len(), 1, "no TLS is not allowed");
}

#[test]
fn a_malformed_file_of_containerd_is_left_out() {
    let machine = Machine::new();
    for text in [
        "[host",
        "[host.\"https://m.lan\"]\ncapabilities = [\"fly\"]",
        "[host.\"https://m.lan\"]\nca = 5",
        "[host.\"ftp://m.lan\"]",
        "[host.\"https://m.lan\"]\n[host.\"https://m.lan\".header]\n\"a b\" = \"c\"",
        "",
    ] {
        machine.write("containerd/r.lan/hosts.toml", text);
        assert_eq!(machine.urls("r.lan", "a"), ["https://r.lan/v2/a/manifests/1"], "{text}");
    }
}

const MIRRORED: &str = "[[registry]]\nlocation = \"docker.io\"\n[[registry.mirror]]\nlocation = \"c.lan:5000/hub\"\n";

#[test]
fn of_several_files_one_says_where_images_are() {
    let machine = Machine::new();
    machine.write("containerd/_default/hosts.toml", "[host.\"https://d.lan\"]\n");
    let first = |machine: &Machine| machine.urls("docker.io", "a/b").remove(0);
    assert_eq!(first(&machine), "https://d.lan/v2/a/b/manifests/1?ns=docker.io");
    machine.write("registries.conf", MIRRORED);
    assert_eq!(first(&machine), "https://c.lan:5000/v2/hub/a/b/manifests/1");
    assert_eq!(machine.urls("quay.io", "a").len(), 2, "the default is for others");
    machine.write("containerd/docker.io/hosts.toml", "[host.\"https://h.lan\"]\n");
    assert_eq!(first(&machine), "https://h.lan/v2/a/b/manifests/1?ns=docker.io");
    let mut machine = machine;
    machine.files.from = HostsFrom::Containers;
    assert_eq!(first(&machine), "https://c.lan:5000/v2/hub/a/b/manifests/1");
    machine.files.from = HostsFrom::Containerd;
    assert_eq!(first(&machine), "https://h.lan/v2/a/b/manifests/1?ns=docker.io");
    machine.files.from = HostsFrom::Nobody;
    assert_eq!(first(&machine), "https://registry-1.docker.io/v2/a/b/manifests/1");
}

#[test]
fn the_longest_prefix_counts_and_is_replaced() {
    let machine = Machine::new();
    machine.write(
        "registries.conf",
        r#"
        unqualified-search-registries = ["quay.io"]
        [[registry]]
        prefix = "r.lan"
        location = "r.lan/"
        [[registry.mirror]]
        location = "m.lan:5000"
        [[registry]]
        prefix = "r.lan/team"
        location = "other.lan/moved/team"
        [[registry]]
        prefix = "*.example.com"
        [[registry.mirror]]
        location = "m.lan/example"
        "#,
    );
    for (registry, repository, want) in [
        (
            "r.lan",
            "a/b",
            &[
                "https://m.lan:5000/v2/a/b/manifests/1",
                "https://r.lan/v2/a/b/manifests/1",
            ][..],
        ),
        ("r.lan", "team/b", &["https://other.lan/v2/moved/team/b/manifests/1"]),
        (
            "r.lan",
            "teams/b",
            &[
                "https://m.lan:5000/v2/teams/b/manifests/1",
                "https://r.lan/v2/teams/b/manifests/1",
            ],
        ),
        ("r.lan:5000", "a", &["https://r.lan:5000/v2/a/manifests/1"]),
        (
            "x.example.com",
            "a",
            &[
                "https://m.lan/v2/example/a/manifests/1",
                "https://x.example.com/v2/a/manifests/1",
            ],
        ),
        ("example.com", "a", &["https://example.com/v2/a/manifests/1"]),
        ("badexample.com", "a", &["https://badexample.com/v2/a/manifests/1"]),
        ("quay.io", "a", &["https://quay.io/v2/a/manifests/1"]),
    ] {
        assert_eq!(machine.urls(registry, repository), want, "{registry}/{repository}");
    }
}

#[test]
fn mirrors_by_tag_and_by_digest() {
    let machine = Machine::new();
    let kinds = ["all", "digest-only", "tag-only"];
    let mirrors: String = kinds
        .iter()
        .map(|kind| format!("[[registry.mirror]]\nlocation = \"{kind}.lan\"\npull-from-mirror = \"{kind}\"\n"))
        .collect();
    machine.write(
        "registries.conf",
        &format!("[[registry]]\nlocation = \"r.lan\"\n{mirrors}"),
    );
    let can = |by_digest| {
        let places = machine
            .places_for("r.lan", "a", by_digest, PlainHttp::Loopback)
            .unwrap();
        places
            .iter()
            .map(|place| (place.resolves, place.pulls))
            .collect::<Vec<_>>()
    };
    assert_eq!(can(false), [(true, true), (false, true), (true, true), (true, true)]);
    assert_eq!(can(true), [(true, true), (false, true), (true, false), (true, true)]);
    machine.write(
        "registries.conf",
        "[[registry]]\nlocation = \"r.lan\"\nmirror-by-digest-only = true\n[[registry.mirror]]\nlocation = \"m.lan\"\n",
    );
    assert_eq!(can(false), [(false, true), (true, true)]);
}

#[test]
fn insecure_is_any_certificate_or_none() {
    let machine = Machine::new();
    machine.write(
        "registries.conf",
        "[[registry]]\nlocation = \"r.lan:5000\"\ninsecure = true\n",
    );
    let endpoint = |plain| {
        let places = machine.places_for("r.lan:5000", "a", false, plain).unwrap();
        places[0].repository.endpoint.clone()
    };
    let open = endpoint(PlainHttp::Loopback);
    assert!(open.is_open() && open.settings().tls.is_unverified && open.base().scheme() == "https");
    assert!(!endpoint(PlainHttp::Nowhere).is_open());
    assert!(endpoint(PlainHttp::Everywhere).is_plain());
}

#[test]
fn files_of_the_containers_tools_in_their_order() {
    let machine = Machine::new();
    let location = |location: &str| format!("[[registry]]\nprefix = \"r.lan\"\nlocation = \"{location}\"\n");
    let now = || machine.urls("r.lan", "a").remove(0);
    machine.write("registries.conf", &location("system.lan"));
    assert_eq!(now(), "https://system.lan/v2/a/manifests/1");
    machine.write("user.conf", &location("user.lan"));
    assert_eq!(now(), "https://user.lan/v2/a/manifests/1");
    machine
        .write("registries.conf.d/20.conf", &location("second.lan"))
        .write("registries.conf.d/10.conf", &location("first.lan"))
        .write("registries.conf.d/30.txt", "no");
    assert_eq!(now(), "https://second.lan/v2/a/manifests/1");
    machine.write("user.conf.d/00.conf", &location("last.lan"));
    assert_eq!(now(), "https://last.lan/v2/a/manifests/1");
    machine.write(
        "user.conf.d/01.conf",
        "[[registry]]\nlocation = \"r.lan\"\nblocked = true\n",
    );
    let error = machine.places_of("r.lan", "a").unwrap_err().to_string();
    assert!(
        error.contains("r.lan/a") && error.contains("01.conf blocks r.lan"),
        "{error}"
    );
    assert_eq!(machine.urls("quay.io", "a").len(), 1);
}

#[test]
fn malformed_files_of_the_containers_tools_are_errors_that_quote_nothing() {
    let machine = Machine::new();
    for (text, word) in [
        ("[[registry]\n", "line 1"),
        ("\n\n[[registry]]\nlocation = 5\n", "line 4"),
        ("[[registry]]\nprefix = \"r.lan\"\n", "no location"),
        ("[[registry]]\nlocation = \"https://r.lan\"\n", "scheme"),
        (
            "[[registry]]\nlocation = \"r.lan\"\n[[registry.mirror]]\nlocation = \"/\"\n",
            "mirror of `r.lan`",
        ),
    ] {
        machine.write("registries.conf", text);
        let error = machine.places_of("q.lan", "a").unwrap_err().to_string();
        assert!(
            error.contains("registries.conf is not valid") && error.contains(word),
            "{text}: {error}"
        );
    }
}

#[test]
fn the_standard_files() {
    let with = |name: &str| match name {
        "HOME" => Some(PathBuf::from("/home/u")),
        "CONTAINERS_REGISTRIES_CONF" => Some(PathBuf::from("/mine")),
        _ => None,
    };
    let files = HostFiles::standard(&with);
    let paths = |texts: &[&str]| texts.iter().map(PathBuf::from).collect::<Vec<_>>();
    assert_eq!(files.containerd, paths(&["/etc/containerd/certs.d"]));
    assert_eq!(
        files.containers,
        paths(&[
            "/mine",
            "/home/u/.config/containers/registries.conf",
            "/etc/containers/registries.conf"
        ])
    );
    assert_eq!(
        files.containers_more,
        paths(&[
            "/etc/containers/registries.conf.d",
            "/home/u/.config/containers/registries.conf.d"
        ])
    );
    assert_eq!(
        files.certificates,
        paths(&[
            "/etc/docker/certs.d",
            "/etc/containers/certs.d",
            "/home/u/.config/containers/certs.d"
        ])
    );
}

proptest! {
    #[test]
    fn text_never_panics(text in "(\\[host\\.\"|\\[\\[registry\\]\\]\n|location = \"|ca = \\[|\"\\]|\n|=|[a-z./:*]){0,30}") {
        let machine = Machine::new();
        machine.write("containerd/r.lan/hosts.toml", &text);
        machine.write("registries.conf", &text);
        let _ = machine.places_of("r.lan", "a/b");
        let _ = machine.places_of("x.lan", "a/b");
    }
}
