#[test]
fn zdebug() {
    let blob = std::fs::read(std::env::var("ZBLOB").unwrap()).unwrap();
    let spacing = std::env::var("ZSP").map_or(512 << 10, |s| s.parse().unwrap());
    let (p, index, _) = super::pass(&blob, spacing, 65536, 65536).unwrap();
    let last = ocifs::index::SpanId(index.len() as u32 - 1);
    for span in index.spans().filter(|&s| index.restart_for(s) == s) {
        let at = index.blob_range(span, span).start;
        let got = super::read(&index, &blob, span, last, 50000);
        match got {
            Ok(b) => assert!(b == p.tar[index.tar_range(span).start as usize..], "wrong {span}"),
            Err(e) => println!(
                "{span} of {} at {at} tar {}: {e}",
                index.len(),
                index.tar_range(span).start
            ),
        }
    }
}
