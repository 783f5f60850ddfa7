use super::*;
use crate::snapshot::report::{
    PoolState, Problem, PublishState, SnapshotNumbers, StoreNumbers, StoreScrub, StoreState,
};

const EVIL: &str = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&";

fn layer(serial: u64, state: &str) -> LayerReport {
    LayerReport {
        serial,
        diff_id: format!("sha256:{}", "ab".repeat(32)),
        origin: "fetched".into(),
        state: state.into(),
        percent: if state == "complete" { 100 } else { 40 },
        problem: None,
        bytes: 5 << 20,
        fetched: 1 << 20,
        shared: 0,
        evicted: 0,
        inodes: 10,
        snapshots: 1,
        attached: true,
        lazy: state != "complete",
        pinned: false,
        published: true,
        used: 1_000_000,
    }
}

fn status() -> StatusReport {
    StatusReport {
        version: "0.1.0".into(),
        node: "node-7".into(),
        root: "/var/lib/speedy".into(),
        containerd: Some("2.4.2".into()),
        layer_images: "mounted from files".into(),
        lazy: "on".into(),
        snapshots: Default::default(),
        pools: Vec::new(),
        layers: Default::default(),
        store: Some(StoreState {
            url: "s3://bucket/p".into(),
            state: "in use".into(),
            trust: "keys".into(),
            keys: vec!["k".into()],
            numbers: StoreNumbers::default(),
            scrub: None,
        }),
        traces: Default::default(),
        publish: PublishState::default(),
        mirror: None,
        free_bytes: 100 << 30,
    }
}

#[test]
fn a_healthy_node_says_so() {
    let page = render(&status(), vec![layer(1, "complete"), layer(2, "filling")], Vec::new(), 1_000_060);
    for wanted in [
        "<h1>Speedy on node-7</h1>",
        "<span class=\"badge good\">ok</span>",
        "1970-01-12T13:47:40Z",
        "s3://bucket/p",
        "1 filling",
        "<progress max=\"100\" value=\"40\">",
        "60 s ago",
        "5.00 MiB",
        "none since the start",
    ] {
        assert!(page.contains(wanted), "{wanted} is not in\n{page}");
    }
    assert!(!page.contains("class=\"problem"), "{page}");
    assert!(!page.contains("http:") && !page.contains("https:") && !page.contains(" src="), "{page}");
}

/// Names of images and what a store answers come from strangers, and the page is read by an operator's browser.
#[test]
fn nothing_that_others_wrote_becomes_markup() {
    let mut status = status();
    status.node = EVIL.into();
    status.root = EVIL.into();
    status.containerd = Some(EVIL.into());
    status.layer_images = EVIL.into();
    status.publish.policy = EVIL.into();
    status.publish.problems =
        vec![Problem { chain: EVIL.into(), image: Some(EVIL.into()), retried: true, message: EVIL.into() }];
    if let Some(store) = &mut status.store {
        (store.url, store.state, store.trust) = (EVIL.into(), EVIL.into(), EVIL.into());
        store.numbers.resting = true;
    }
    let failed = LayerReport {
        problem: Some(EVIL.into()),
        diff_id: EVIL.into(),
        origin: EVIL.into(),
        ..layer(3, "failed")
    };
    let strange = LayerReport { state: EVIL.into(), ..layer(4, "complete") };
    let fault = Fault { at: 1, is_error: true, text: EVIL.into(), times: 2 };
    let page = render(&status, vec![failed, strange], vec![fault], 5);
    for markup in ["<script", "<img", "onerror=alert(2)>&"] {
        assert!(!page.contains(markup), "{markup} is in\n{page}");
    }
    assert!(page.matches("&#60;script&#62;").count() >= 12, "{page}");
    let policy = HEADERS.iter().find(|(name, _)| *name == "content-security-policy").unwrap().1;
    assert!(policy.starts_with("default-src 'none'"));
}

#[test]
fn what_is_wrong_is_said_with_what_to_do() {
    let mut status = status();
    status.containerd = None;
    status.free_bytes = 1000;
    status.layers.lazy = 2;
    status.layers.bytes = 2000;
    status.layers.disk.limit = Some(1000);
    (status.layers.disk.damaged, status.layers.disk.repaired) = (3, 1);
    status.publish.dropped = 1;
    status.publish.problems =
        vec![Problem { chain: "c".into(), image: None, retried: true, message: "m".into() }];
    status.lazy = "off: this kernel cannot; see the log and speedy check".into();
    if let Some(store) = &mut status.store {
        store.numbers.resting = true;
        store.scrub = Some(StoreScrub { missing: 1, damaged: 2, ..StoreScrub::default() });
    }
    let layers = vec![LayerReport { problem: Some("gone".into()), ..layer(9, "failed") }];
    let found = problems::of(&status, &layers);
    let alarms: Vec<_> = found.iter().map(|trouble| trouble.alarm).collect();
    let urgent = [
        "SpeedyDiskFull",
        "SpeedyLayerDamaged",
        "SpeedyLayersFailed",
        "SpeedyStoreDamaged",
        "SpeedyStoreUnreachable",
    ];
    assert_eq!(alarms[..5], urgent);
    let others = [
        "SpeedyLayersOverLimit",
        "SpeedyPublishGivenUp",
        "SpeedyPublishStuck",
        "SpeedyContainerdAway",
        "SpeedyKernelCannot",
    ];
    assert_eq!(alarms[5..], others);
    let page = render(&status, layers, Vec::new(), 5);
    assert!(page.contains("10 to look at") && page.contains("Layer 9 cannot be fetched: gone"), "{page}");
}

#[test]
fn a_thousand_layers_make_no_endless_page() {
    let mut layers: Vec<LayerReport> = (0..1000).map(|serial| layer(serial, "complete")).collect();
    layers.push(layer(5000, "failed"));
    let page = render(&status(), layers, Vec::new(), 5);
    assert!(page.contains("and 801 more"), "{page}");
    assert!(page.contains(">5000<"), "what failed is shown first");
}

#[test]
fn a_strangers_name_for_our_address_is_not_answered() {
    for own in [
        None,
        Some("127.0.0.1:9890"),
        Some("localhost:9890"),
        Some("LOCALHOST"),
        Some("[::1]:80"),
        Some("[::1]"),
    ] {
        assert!(is_own_host(own), "{own:?}");
    }
    for other in
        ["evil.example", "evil.example:9890", "127.0.0.1.evil.example", "localhost.evil.example:1", ""]
    {
        assert!(!is_own_host(Some(other)), "{other}");
    }
}

#[test]
fn a_second_root_is_shown_with_its_pool_and_what_is_wrong_with_it() {
    let mut status = status();
    status.pools.push(PoolState {
        snapshotter: Some("speedy-thin".into()),
        root: "/var/lib/thin".into(),
        snapshots: SnapshotNumbers { active: 3, ..SnapshotNumbers::default() },
        data_free: 55,
        metadata_free: 66,
        trouble: None,
    });
    let page = render(&status, Vec::new(), Vec::new(), 1_000_000);
    assert!(page.contains("speedy-thin: 3 active, 0 committed"), "{page}");
    assert!(page.contains("55 % of data and 66 % of metadata free") && !page.contains("SpeedyPoolInTrouble"));
    status.pools[0].metadata_free = 9;
    let page = render(&status, Vec::new(), Vec::new(), 1_000_000);
    assert!(
        page.contains("SpeedyPoolInTrouble") && page.contains("9 % of metadata are free in the pool"),
        "{page}"
    );
    status.pools[0].trouble = Some("the pool has failed".into());
    assert!(
        render(&status, Vec::new(), Vec::new(), 1_000_000).contains("/var/lib/thin: the pool has failed")
    );
}
