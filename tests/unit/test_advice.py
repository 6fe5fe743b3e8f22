"""Advice in words."""

from gradleak.audit.advice import Tried, advice

BARE = Tried("none", 1.0, "analytic", 0.01, accuracy=0.91)


def test_a_sentence_says_what_is_saved_what_it_costs_and_what_is_proven() -> None:
    tried = Tried("dp-sgd:1:0.8", 0.07, "map-inversion", 0.01, accuracy=0.89, epsilon=8.94)
    assert advice([BARE, tried]) == [
        "dp-sgd:1:0.8: epsilon 8.94 at delta 1e-05; top-1 falls from 100 % to 7 % (map-inversion); accuracy goes from 0.91 to 0.89."
    ]


def test_a_defense_that_only_breaks_an_attack_is_not_called_safe() -> None:
    [sentence] = advice([BARE, Tried("top-k:0.1", 0.98, "likely-text", 0.01, unaware=0.0)])
    assert "hides nothing: top-1 stays at 98 % (likely-text)" in sentence
    assert "an attacker who does not know it would reach 0 %" in sentence
    assert "nothing is proven" in sentence


def test_chance_is_called_chance_of_what_was_tried() -> None:
    [sentence] = advice([BARE, Tried("sign", 0.01, "dlg", 0.01)])
    assert "falls from 100 % to 1 %, which is chance, in all attacks tried" in sentence


def test_of_texts_it_says_what_comes_back_whole_what_chance_has_and_the_perplexity() -> None:
    bare = Tried("none", 1.0, "embedding-rows", 0.26, whole=1.0, perplexity=412.6)
    tried = Tried("bits:2", 0.43, "dager", 0.26, whole=0.2, perplexity=498.02)
    assert advice([bare, tried], "ROUGE-1") == [
        "bits:2: nothing is proven; ROUGE-1 falls from 100 % to 43 % (dager), where chance has 26 %, and 20 % of the texts come back "
        "whole; perplexity goes from 412.6 to 498."
    ]
