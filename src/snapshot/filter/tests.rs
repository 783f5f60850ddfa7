use std::borrow::Cow;
use std::collections::BTreeMap;

use super::{Filter, FilterError, MAX_FIELDS, MAX_LENGTH, MAX_PATTERNS, MAX_SELECTORS, Subject};

/// A subject with the fields a snapshot has.
#[derive(Debug, Default)]
struct Thing {
    name: &'static str,
    parent: &'static str,
    labels: BTreeMap<String, String>,
}

impl Subject for Thing {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path.first()?.as_str() {
            "name" => Some(self.name.into()),
            "parent" => Some(self.parent.into()),
            "labels" => self.labels.get(&path[1..].join(".")).map(|v| v.into()),
            _ => None,
        }
    }
}

fn thing(name: &'static str, parent: &'static str, labels: &[(&str, &str)]) -> Thing {
    let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    let labels = labels.iter().map(own).collect();
    Thing { name, parent, labels }
}

fn corpus() -> Vec<Thing> {
    vec![
        thing("base", "", &[("tier", "one")]),
        thing("top", "base", &[]),
        thing("base", "a b, c", &[("tier", "two"), ("with some spaces", "yes")]),
        thing("other", "base", &[("a \\ and a \"", "yes")]),
        thing("other", "abc", &[("a \\ and a \".tail", "yes")]),
        thing("dots", "cab", &[("a.b.c", "x_y.z-0:1/2@3")]),
        thing(
            "hit",
            "p/1/x",
            &[("containerd.io/snapshot.ref", "sha256:00ff"), ("empty", ""), ("caf\u{e9}", "\u{725b}")],
        ),
    ]
}

fn parse(expression: &str) -> Result<Filter, FilterError> {
    Filter::parse(&[expression.to_owned()])
}

fn found(expressions: &[&str]) -> Vec<usize> {
    let owned: Vec<String> = expressions.iter().map(|e| (*e).to_owned()).collect();
    let filter = Filter::parse(&owned).unwrap_or_else(|e| panic!("{expressions:?}: {e}"));
    let corpus = corpus();
    let hits = corpus.iter().enumerate().filter(|(_, t)| filter.matches(*t));
    hits.map(|(i, _)| i).collect()
}

const ALL: &[usize] = &[0, 1, 2, 3, 4, 5, 6];
const NONE: &[usize] = &[];

#[test]
fn nothing_and_the_empty_expression_match_everything() {
    assert_eq!(found(&[]), ALL);
    assert_eq!(found(&[""]), ALL);
    assert_eq!(found(&["name==none", ""]), ALL);
    assert!(Filter::parse(&[]).unwrap().is_everything());
    assert!(parse("").unwrap().is_everything());
    assert!(!parse("name").unwrap().is_everything());
    // A mistake beside an empty expression is still a mistake.
    assert!(Filter::parse(&[String::new(), "name=".into()]).is_err());
}

/// An expression, and which of the corpus it selects.
const SELECTING: &[(&str, &[usize])] = &[
    // Presence.
    ("name", ALL),
    ("parent", ALL),
    ("unknown", NONE),
    ("labels.tier", &[0, 2]),
    ("labels.tier,name", &[0, 2]),
    ("labels.empty", &[6]),
    ("labels", NONE),
    // Equality.
    ("name==base", &[0, 2]),
    ("name==\"base\"", &[0, 2]),
    ("labels.tier==one", &[0]),
    ("parent==\"\"", &[0]),
    ("parent==\"a b, c\"", &[2]),
    ("labels.a.b.c==x_y.z-0:1/2@3", &[5]),
    ("labels.a.b.c", &[5]),
    ("labels.\"a.b\".c", &[5]),
    ("unknown==\"\"", NONE),
    ("labels.empty==\"\"", &[6]),
    // Inequality reads an absent field as empty.
    ("name!=base", &[1, 3, 4, 5, 6]),
    ("labels.tier!=one", &[1, 2, 3, 4, 5, 6]),
    ("unknown!=x", ALL),
    ("unknown!=\"\"", NONE),
    // Conjunction.
    ("name==base,labels.tier==two", &[2]),
    ("name==base,labels.tier==three", NONE),
    // Quoted paths.
    ("labels.\"with some spaces\"", &[2]),
    (r#"labels."a \\ and a \""==yes"#, &[3]),
    (r#"labels."a \\ and a \"".tail==yes"#, &[4]),
    (r#""name"=="top""#, &[1]),
    // Regular expressions are not anchored.
    ("parent~=[abc]+,name!=top", &[2, 3, 4, 5]),
    ("parent~=/^[abc]+$/", &[4, 5]),
    ("parent~=/^[abc]{2,3}$/", &[4, 5]),
    ("parent~=|^p/1|", &[6]),
    (r"parent~=/^p\/1/", &[6]),
    (r#"parent~="^p/1""#, &[6]),
    ("unknown~=x", NONE),
    ("unknown~=/^$/", ALL),
    // A broken pattern matches nothing, and is no error.
    ("name~=(", NONE),
    ("name~=/a{1001}/", NONE),
    (r#"name~="\xff""#, NONE),
    // Escapes.
    (r#"name=="\x62\141\u0073\U00000065""#, &[0, 2]),
    (r#"labels."caf\u00e9"=="\xe7\x89\x9b""#, &[6]),
    ("labels.\"caf\u{e9}\"==\u{725b}", &[6]),
    (r#"name=="\a\b\f\n\r\t\v\\\"""#, NONE),
    // Bytes that are no text are equal to nothing.
    (r#"name=="\xff""#, NONE),
    (r#"name!="\xff""#, ALL),
    (r#"labels."\xff""#, NONE),
    (r#"labels."\xff"!=x"#, ALL),
    (r#"name=="\ud800""#, NONE),
    // White space before a token.
    (" name ==  base", &[0, 2]),
    ("name==base, labels.tier == two", &[2]),
    ("labels. tier==one", &[0]),
    ("name==base,\n\tlabels.tier==two", &[2]),
    // Quotes inside an unquoted value are ordinary.
    ("name==a\"b|c", NONE),
    ("name==\u{1}x", NONE),
    // What containerd's metadata layer sends after "already exists".
    ("labels.\"containerd.io/snapshot.ref\"==sha256:00ff,parent==\"p/1/x\"", &[6]),
];

#[test]
fn expressions_select_what_containerd_selects() {
    for (expression, expected) in SELECTING {
        assert_eq!(found(&[expression]), *expected, "{expression}");
    }
}

#[test]
fn several_expressions_are_alternatives() {
    assert_eq!(found(&["name==top", "labels.tier==one"]), [0, 1]);
    assert_eq!(found(&["name==none", "name==nobody"]), NONE);
}

#[test]
fn mistakes_are_reported_where_they_are() {
    // Expression, byte, a part of the message.
    let cases: &[(&str, usize, &str)] = &[
        (" ", 1, "unexpected end"),
        (",", 0, "expected a field name"),
        ("name==base,", 11, "unexpected end"),
        ("name==base,,name", 11, "expected a field name"),
        ("labels.", 7, "unexpected end"),
        ("labels..a", 7, "expected a field name"),
        ("labels.?\"a\"", 7, "expected a field name"),
        (".a", 0, "expected a field name"),
        ("labels.|a|==b", 7, "only for the value of ~="),
        ("labels.ns/key==v", 9, "expected an operator"),
        ("labels./ns/", 7, "only for the value of ~="),
        ("labels.key==/v", 12, "only for the value of ~="),
        ("labels.key~=/v", 12, "not terminated"),
        ("labels.key==\"v", 12, "not terminated"),
        ("labels.\"a\nb\"", 7, "not terminated"),
        ("labels.\"a\\\nb\"", 9, "illegal escape"),
        ("name=base", 4, "unsupported operator \"=\""),
        ("name===base", 4, "unsupported operator \"===\""),
        ("name=!base", 4, "unsupported operator \"=!\""),
        ("name=~base", 4, "unsupported operator \"=~\""),
        ("name== =base", 7, "expected a value"),
        ("name~=,id", 6, "expected a value"),
        ("name==", 6, "unexpected end"),
        ("name==.a", 6, "expected a value"),
        ("name base", 5, "expected an operator"),
        ("name ", 5, "unexpected end"),
        ("name ,parent", 5, "expected an operator"),
        ("labels .a", 7, "expected an operator"),
        ("name==base ", 10, "unexpected input ' '"),
        ("name==base x", 10, "unexpected input ' '"),
        ("name==\"a\"b", 9, "unexpected input 'b'"),
        (r#"labels."\g""#, 8, "illegal escape"),
        (r#"labels."\'""#, 8, "illegal escape"),
        (r#"labels."\/""#, 8, "illegal escape"),
        (r"name~=/\d/", 7, "illegal escape"),
        (r#"labels."\xaz""#, 8, "illegal numeric escape"),
        (r#"labels."\400""#, 8, "illegal numeric escape"),
        (r#"labels."\08""#, 8, "illegal numeric escape"),
        (r#"labels."\u12""#, 8, "illegal numeric escape"),
        (r#"labels."\U00110000""#, 8, "illegal numeric escape"),
        (r#"labels."\UFFFFFFFF""#, 8, "illegal numeric escape"),
        ("labels.\"\\", 8, "illegal escape"),
        ("na\0me", 2, "unexpected null"),
        ("name==\0", 6, "unexpected null"),
        ("name==\"\0\"", 7, "unexpected null"),
        ("name==\u{fffd}", 6, "invalid character"),
        ("name==a\u{200b}b", 7, "unexpected input"),
        ("n\u{e9}", 1, "expected an operator"),
    ];
    for (expression, position, message) in cases {
        let error = parse(expression).expect_err(expression);
        assert_eq!(error.position, *position, "{expression:?}: {error}");
        assert!(error.message.contains(message), "{expression:?}: {error}");
        assert_eq!(error.expression, *expression);
        assert!(!error.to_string().contains('\n'));
    }
}

#[test]
fn errors_show_the_place() {
    let error = parse("labels.|a|==b").unwrap_err().to_string();
    assert!(error.starts_with("invalid filter [labels. >|||< a|==b] at byte 7: "), "{error}");
    let error = parse("name==\n").unwrap_err().to_string();
    assert!(error.starts_with("invalid filter [name==\\n] at byte 7: "), "{error}");
    let long = format!("name=={} {}", "\u{e9}".repeat(500), "b".repeat(500));
    let error = parse(&long).unwrap_err().to_string();
    assert!(error.len() < 300, "{error}");
    assert!(error.contains(" >| |< bbb"), "{error}");
}

#[test]
fn size_is_bounded() {
    let long = format!("name=={}", "a".repeat(MAX_LENGTH));
    assert!(parse(&long).unwrap_err().to_string().len() < 300);
    let fits = format!("name=={}", "a".repeat(MAX_LENGTH - 6));
    assert!(parse(&fits).is_ok());
    assert!(parse(&"name,".repeat(MAX_SELECTORS)).is_err());
    assert!(Filter::parse(&vec!["name".to_owned(); MAX_SELECTORS + 1]).is_err());
    assert!(Filter::parse(&vec!["name".to_owned(); MAX_SELECTORS]).is_ok());
    assert!(parse(&format!("a{}", ".a".repeat(MAX_FIELDS))).is_err());
    assert!(parse(&format!("a{}", ".a".repeat(MAX_FIELDS - 1))).is_ok());
    assert!(Filter::parse(&vec!["name~=a".to_owned(); MAX_PATTERNS + 1]).is_err());
    let key: String = "\\U0010ffff".repeat(32 * 1024);
    assert!(parse(&format!("name==\"{key}\"")).is_ok());
}

/// A small generator of numbers, so that the test needs no crate and repeats itself exactly.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % bound as u64).unwrap()
    }
}

#[test]
fn no_input_panics() {
    const PIECES: &[&str] = &[
        "name",
        "labels",
        ".",
        ",",
        "==",
        "!=",
        "~=",
        "=",
        "\"",
        "/",
        "|",
        "\\",
        "\\x",
        "\\u00",
        "\\U0000",
        "\\3",
        "4",
        "f",
        " ",
        "\n",
        "\0",
        "\u{e9}",
        "\u{725b}",
        "\u{fffd}",
        "\u{85}",
        "\u{10ffff}",
        "[",
        "]",
        "(",
        ")",
        "{",
        "}",
        "*",
        "+",
        "?",
        "^",
        "-",
        "&&",
        "\\Q",
        "\\E",
        "[:alpha:]",
        "\\p",
        "\\b",
        "1001",
        "$",
        "<",
        "P",
        "'",
        "`",
        "a",
    ];
    let mut numbers = Numbers(0x5eed_5eed_5eed_5eed);
    let subjects = corpus();
    for _ in 0..100_000 {
        let count = numbers.below(14);
        let expression: String = (0..count).map(|_| PIECES[numbers.below(PIECES.len())]).collect();
        match parse(&expression) {
            Ok(filter) => {
                for subject in &subjects {
                    filter.matches(subject);
                }
            }
            Err(error) => {
                assert!(error.position <= expression.len());
                assert!(!error.to_string().is_empty());
            }
        }
    }
}
