"""Models of Open-Sora-Plan's classes that were trained on latents with more channels than its own."""


def test_a_model_of_eight_latent_channels_goes_from_an_empty_latent_to_frames(in_process):
    found = in_process("channels")
    assert found["latent"] == [1, 8, 8, 8, 8] and found["encoded"] == found["latent"]
    assert found["frames"] == [1, 29, 64, 64, 3]
    assert found["preview"] == [8, 8]
    assert found["unlike the four alone"] < 0.02, "the further ones are not listened to yet"
    assert "expected (batch, 8, frames" in found["refused"]
