use super::{
    Format,
    picture::{LEVELS, Look, level},
    svg::Escaped,
    text::groups,
};
use crate::chain::map::{Counts, State};

fn cell(states: &[(State, u64)]) -> Counts {
    let mut counts = Counts::default();
    states.iter().for_each(|(state, pages)| counts.add(*state, *pages));
    counts
}

#[test]
fn a_little_of_what_stands_out_is_seen() {
    let look = |states| Look::of(&cell(states));
    assert_eq!(look(&[]), Look::default());
    let parent = Some(State::Parent);
    assert_eq!(look(&[(State::Parent, 10)]), Look { base: parent, over: None });
    let little = look(&[(State::Parent, 1_000_000), (State::Here, 1)]);
    assert_eq!(little, Look { base: parent, over: Some((State::Here, 1)) });
    let all = look(&[(State::Freed, 5), (State::Here, 3)]);
    assert_eq!(all, Look { base: None, over: Some((State::Freed, LEVELS)) });
    // Of equals, what is worse.
    let equal = look(&[(State::Missing, 5), (State::Here, 5)]);
    assert_eq!(equal.over.map(|(state, _)| state), Some(State::Missing));
    assert_eq!([level(1, 1000), level(10, 1000), level(u64::MAX, u64::MAX)], [1, 2, LEVELS]);
}

#[test]
fn groups_are_equal_and_hold_all() {
    assert_eq!(groups(5, 10), [0..1, 1..2, 2..3, 3..4, 4..5]);
    assert_eq!(groups(5, 2), [0..3, 3..5]);
    assert_eq!(groups(1000, 240).len(), 200);
}

#[test]
fn names_cannot_break_out_of_a_picture() {
    let name = "<script>\"&\u{1b}[2J\u{ffff}</script>";
    let escaped = "&lt;script&gt;&quot;&amp;\u{fffd}[2J\u{fffd}&lt;/script&gt;";
    assert_eq!(Escaped(name).to_string(), escaped);
}

#[test]
fn the_name_of_a_file_says_its_format() {
    let of = |name: &str| Format::of(name.as_ref()).ok();
    assert_eq!(of("a.SVG"), Some(Format::Svg));
    assert_eq!(of("a.html"), Some(Format::Html));
    assert_eq!([of("svg"), of("a.pdf")], [None, None]);
}
